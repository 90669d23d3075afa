"""What EC2 says of its instances: a line of JSON whenever it has changed. Runs on a lab host."""

import json
import time

import boto3

ec2 = boto3.client("ec2")
told = ""
while True:
    found = [instance for page in ec2.describe_instances()["Reservations"] for instance in page["Instances"]]
    line = json.dumps(found, default=str)
    if line != told:
        print(line, flush=True)
        told = line
    time.sleep(0.5)
