"""Several hosts on this machine, with no way out: for tests that bring up a cluster over SSH.

A host is a set of namespaces (network, mounts, processes, IPC, name) with a home, a /tmp and an sshd of its own. A
bridge in a namespace of its own joins them. Nothing outlives this process: the kernel ends a namespace with its
processes, and those with this one.

What a machine image has, and what stands in for the rest of the world:
- `python3` is the one that runs the tests, and ~/venv sees its packages. So `pip install` finds Ray, torch and all else
  that is asked for already there, and installs nothing but fmtune itself, for real, from the files that were synced;
  there is no index to ask.
- `sudo` runs its command as it is, and `apt-get` does nothing.
- The user `ubuntu` is root under another name.
- /mnt is one folder for all hosts, as NFS would give them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

PROJECT = Path(__file__).parents[2]
OPERATOR = "172.31.255.250"
"""Address of the host that plays the user's own machine."""
_TOOLS = ("curl", "ip", "nsenter", "unshare", "setpriv", "rsync", "ssh", "ssh-keygen", "/usr/sbin/sshd")
_MORTAL = ("setpriv", "--pdeathsig", "KILL")
"""Prefix of a command that is to end with the process that starts it."""
_NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
_SSHD = """\
HostKey /root/host_key
PidFile /run/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
MaxStartups 50:30:100
MaxSessions 50
"""
_COMMANDS = {"pip": "pip._internal.cli.main", "ray": "ray.scripts.scripts"}
"""Commands of the packages that ~/venv sees, and the module of each."""
_COMMAND = """\
#!/root/venv/bin/python
import sys
from {module} import main
sys.exit(main())
"""
_STAND_INS = {"sudo": '#!/bin/sh\nexec "$@"\n', "apt-get": "#!/bin/sh\nexit 0\n"}


def find_obstacle() -> str | None:
    """Why there can be no lab on this machine, None if there can."""
    if os.getuid() != 0:
        return "needs root, for namespaces"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install -y curl iproute2 openssh-server rsync"
    if subprocess.run(["unshare", *_NAMESPACES, "true"], capture_output=True, check=False).returncode != 0:
        return "needs the right to make namespaces, which this container does not have"
    return None


@dataclass(frozen=True)
class Host:
    """A running host.

    Attributes:
        address: on the lab's network.
        home: its /root, as seen from outside.
        init: its process 1, as numbered outside.
    """

    name: str
    address: str
    home: Path
    init: int
    process: subprocess.Popen[str]

    def start(self, command: str, output: IO[str] | int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        """Start a shell command in root's home, with its standard output and errors to `output`."""
        return subprocess.Popen(
            [*_MORTAL, *self._enter(), "bash", "-c", f"cd; . ~/.bashrc; {command}"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str, seconds: int = 120) -> str:
        """What a shell command prints; it must succeed in time."""
        # A file: SSH leaves connections behind, for the next command, that would hold a pipe open.
        with tempfile.TemporaryFile("w+") as output:
            code = self.start(f"timeout --kill-after=5 {seconds} bash -c {shlex.quote(command)}", output).wait()
            output.seek(0)
            text = output.read()
        assert code == 0, f"{self.name}: `{command}` ended with {code}: {text}"
        return text

    def power_off(self) -> None:
        """End all its processes at once, without a word to anybody."""
        if self.process.poll() is None:
            os.kill(self.init, signal.SIGKILL)
        self.process.wait()

    def _enter(self) -> list[str]:
        environment = ["HOME=/root", "USER=root", "LOGNAME=root", "LANG=C.UTF-8", "TERM=dumb", f"PATH={os.defpath}"]
        return ["nsenter", f"--target={self.init}", "--all", "env", "-i", *environment]


class Lab:
    """A network of hosts.

    Args:
        folder: takes the hosts' files.
        environment: lines of each host's ~/.bashrc.
    """

    def __init__(self, folder: Path, environment: str = "") -> None:
        self.shared = folder / "shared"
        self.shared.mkdir(parents=True)
        self._folder, self._environment = folder, environment
        self._hosts: list[Host] = []
        self._create_venv()
        self._key = folder / "key"
        _create_key(self._key)
        create = "ip link add br0 type bridge && ip link set br0 up && echo ready && exec sleep infinity"
        self._bridge = subprocess.Popen(
            [*_MORTAL, "unshare", "--net", "sh", "-c", create],
            stdout=subprocess.PIPE,
            text=True,
        )
        _wait_until_ready(self._bridge)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for host in self._hosts:
            host.power_off()
        self._bridge.kill()
        self._bridge.wait()

    def add_host(self, name: str, address: str, public_address: str | None = None, key: Path | None = None) -> Host:
        """Start a host that admits a private key, the lab's own by default."""
        folder = self._folder / name
        home = folder / "home"
        self._furnish(folder, name, address, key or self._key)
        init = [
            "bash",
            str(Path(__file__).with_name("host.sh")),
            name,
            str(folder),
            str(self.shared),
            *_hidden_folders(),
        ]
        with (folder / "errors").open("w") as errors:
            process = subprocess.Popen(
                [*_MORTAL, "unshare", *_NAMESPACES, "env", "-i", f"PATH={os.environ['PATH']}", *init],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        _wait_until_ready(process)
        number = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        host = Host(name, address, home, number, process)
        self._hosts.append(host)
        self._connect(host, public_address)
        return host

    def add_operator(self) -> Host:
        """Start the host of a user who has the project in ~/project, Ray installed, and the key of the others."""
        host = self.add_host("operator", OPERATOR)
        for name in ("pyproject.toml", "README.md", "LICENSE", "cluster.yaml", "aws-account.yaml"):
            (host.home / "project").mkdir(exist_ok=True)
            shutil.copy(PROJECT / name, host.home / "project" / name)
        for name in ("fmtune", "search_spaces"):
            shutil.copytree(PROJECT / name, host.home / "project" / name)
        shutil.copy(self._key, host.home / ".ssh" / "id")
        with (host.home / ".bashrc").open("a") as file:
            file.write("export PATH=$HOME/venv/bin:$PATH\n")
        return host

    def _create_venv(self) -> None:
        venv = self._folder / "venv"
        subprocess.run([sys._base_executable, "-m", "venv", "--without-pip", str(venv)], check=True)
        (site_packages,) = venv.glob("lib/python*/site-packages")
        (site_packages / "image.pth").write_text(sysconfig.get_path("purelib") + "\n")
        for command, module in _COMMANDS.items():
            _write_script(venv / "bin" / command, _COMMAND.format(module=module))

    def _furnish(self, folder: Path, name: str, address: str, key: Path) -> None:
        """Write the files of a host that has just been installed."""
        home = folder / "home"
        for path in (home / ".ssh", home / "bin", folder / "tmp"):
            path.mkdir(parents=True)
        (folder / "tmp").chmod(0o1777)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        (folder / "resolv.conf").touch()
        users = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("ubuntu:")]
        (folder / "passwd").write_text("\n".join([*users, "ubuntu:x:0:0::/root:/bin/bash"]) + "\n")
        shutil.copytree(self._folder / "venv", home / "venv", symlinks=True)
        for command, text in _STAND_INS.items():
            _write_script(home / "bin" / command, text)
        _create_key(home / "host_key")
        (home / "sshd_config").write_text(_SSHD)
        public = subprocess.run(["ssh-keygen", "-y", "-f", str(key)], check=True, capture_output=True, text=True)
        (home / ".ssh" / "authorized_keys").write_text(public.stdout)
        (home / ".bashrc").write_text(
            f"export PATH=$HOME/bin:{Path(sys._base_executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin\n"
            # Of pip's switches this one reads the wrong way round: 0 is what turns isolated builds off.
            "export PIP_NO_INDEX=1 PIP_NO_BUILD_ISOLATION=0 PIP_DISABLE_PIP_VERSION_CHECK=1 RAY_USAGE_STATS_ENABLED=0\n"
            f"{self._environment}\n"
        )

    def _connect(self, host: Host, public_address: str | None) -> None:
        plug = f"v{host.init}"
        _in_network(self._bridge.pid, f"link add {plug} type veth peer name eth0 netns {host.init}")
        _in_network(self._bridge.pid, f"link set {plug} master br0 up")
        _in_network(host.init, f"addr add {host.address}/16 dev eth0")
        if public_address is not None:
            _in_network(host.init, f"addr add {public_address}/32 dev lo")
        _in_network(host.init, "link set eth0 up")
        # Every address is on this wire, or nowhere.
        _in_network(host.init, "route add default dev eth0")


def _in_network(process: int, command: str) -> None:
    """Run `ip` in the network namespace of a process."""
    subprocess.run(["nsenter", f"--target={process}", "--net", "ip", *command.split()], check=True)


def _wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def _create_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _hidden_folders() -> list[str]:
    """The folders of the running Python that a host's own /tmp and /root would hide."""
    folders = {sys.base_prefix, sys.prefix}
    return sorted(folder for folder in folders if folder.startswith(("/tmp/", "/root/")))


def wait_for(what: str, is_there: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until `is_there` says so, and fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.2)
