"""Makes the stack of aws-account.yaml, as the command in cluster.yaml does. Runs on a lab host, in the project."""

from pathlib import Path

import boto3

boto3.client("cloudformation").create_stack(
    StackName="fmtune",
    TemplateBody=Path("aws-account.yaml").read_text(),
    Capabilities=["CAPABILITY_NAMED_IAM"],
    Parameters=[
        {"ParameterKey": "Bucket", "ParameterValue": "my-bucket"},
        {"ParameterKey": "SshFrom", "ParameterValue": "203.0.113.7/32"},
    ],
)
