#!/bin/bash
# Process 1 of a lab host: its private folders, its sshd, and a parent for orphans (`ray stop` waits until they are gone).
#
#   host.sh NAME FOLDER SHARED [VISIBLE...]
#
# FOLDER has the host's home, tmp and files of /etc; SHARED is what all hosts have at /mnt. VISIBLE are folders under /tmp
# or /root, read-only where they are, that the private ones would hide.
set -eu
name=$1 folder=$2 shared=$3
shift 3

hostname "$name"
mount --make-rprivate /
for path; do
    case $path in
        /tmp/*) inside=$folder/tmp/${path#/tmp/} ;;
        /root/*) inside=$folder/home/${path#/root/} ;;
    esac
    mkdir -p "$inside"
    mount --bind "$path" "$inside"
    mount -o remount,bind,ro "$inside"
done
for file in hosts passwd resolv.conf; do mount --bind "$folder/$file" "/etc/$file"; done
mount --bind "$shared" /mnt
# The size is a bound, not memory that is taken: Ray wants more here than the third of the memory that it may use.
mount -t tmpfs -o size=12g,mode=1777 tmpfs /dev/shm
mount -t tmpfs -o size=16m,mode=755 tmpfs /run
mkdir /run/sshd
mount --rbind "$folder/home" /root
# Last, as FOLDER itself may lie in /tmp.
mount --rbind "$folder/tmp" /tmp
ip link set lo up
/usr/sbin/sshd -f /root/sshd_config -E /root/sshd.log
echo ready
while :; do
    sleep infinity &
    wait $!
done
