"""A Dockerfile read, and carried out without a container engine: in a root directory of its own, on Debian.

``FROM debian:...`` becomes debootstrap of the same release, ``RUN`` a command under chroot with /proc and /dev mounted
in a mount namespace of its own, ``COPY`` a copy of what ``.dockerignore`` leaves. Needs root. As a script, from the
project's root: ``python -m tests.docker.image docker/Dockerfile.cpu ROOT_DIRECTORY``.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

KNOWN = {"FROM", "RUN", "COPY", "ENV", "ARG", "WORKDIR", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "CMD"}
RELEASES = {"12": "bookworm", "13": "trixie"}
INHERITED = (
    *("PIP_CERT", "PIP_FIND_LINKS", "PIP_DEFAULT_TIMEOUT", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"),
    "HTTP_PROXY",
)
CERTIFICATES = "/etc/registry-certificates.crt"  # a copy: apt-get install writes the system's own anew
NETWORK_FILES = ("etc/apt", "etc/ssl", "etc/pip.conf", "etc/xdg/pip", "etc/resolv.conf", "etc/hosts")


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined and comments in between removed."""

    name: str
    value: str


def read_dockerfile(path: Path) -> list[Instruction]:
    """Its instructions in order. ValueError for one that this reader does not know."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    found = [Instruction(name.upper(), value.strip()) for name, _, value in (line.partition(" ") for line in joined)]
    for instruction in found:
        if instruction.name not in KNOWN:
            raise ValueError(f"{path}: unknown instruction {instruction.name}")
    return found


def exec_form(value: str) -> list[str]:
    """The words of a CMD in exec form; that of a HEALTHCHECK follows its options."""
    return json.loads(value[value.index("[") :])


def sent(context: Path) -> list[str]:
    """The files of a build context that ``.dockerignore`` leaves and git knows or would add, relative to it."""
    rules = [line for line in (context / ".dockerignore").read_text().split("\n") if line and not line.startswith("#")]
    known = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(known, cwd=context, check=True, capture_output=True, text=True).stdout.splitlines()
    return [name for name in listed if (context / name).is_file() and not _is_left_out(name, rules)]


def _is_left_out(name: str, rules: list[str]) -> bool:
    left_out = False
    parts = Path(name).parts
    prefixes = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    for rule in rules:  # the last one that speaks of the file, or of a folder above it, decides
        pattern = rule.removeprefix("!").removeprefix("**/")
        candidates = [*prefixes, *(parts if "**/" in rule else ())]
        if any(fnmatch.fnmatchcase(candidate, pattern) for candidate in candidates):
            left_out = not rule.startswith("!")
    return left_out


@dataclass
class Image:
    """What a Dockerfile has made so far: a root directory, and the settings of its next command."""

    root: Path
    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    )
    workdir: str = "/"
    user: str = "0"
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def run(self, command: list[str], *, timeout: float = 1800) -> subprocess.CompletedProcess:
        """A command inside, as the image's user. Its output is captured."""
        mounts = f"mount -t proc proc {self.root}/proc && mount --rbind /dev {self.root}/dev"
        mounts += "".join(f" && mount --bind {path} {self.root}{path}" for path in _wheel_folders())
        entered = f"cd {shlex.quote(self.workdir)} && exec {shlex.join(command)}"
        home = {} if self.user == "0" else {"HOME": self._home()}
        inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
        if (self.root / CERTIFICATES[1:]).exists():
            inherited["PIP_CERT"] = CERTIFICATES
        variables = [f"{key}={value}" for key, value in {**inherited, **self.environment, **home}.items()]
        chroot = ["chroot", f"--userspec={self.user}:{self.user}", str(self.root), "/usr/bin/env", "-i", *variables]
        whole = f"{mounts} && exec {shlex.join([*chroot, '/bin/sh', '-c', entered])}"
        return subprocess.run(
            ["unshare", "--mount", "/bin/sh", "-c", whole], capture_output=True, text=True, timeout=timeout, check=False
        )

    def _home(self) -> str:
        lines = (self.root / "etc/passwd").read_text().splitlines()
        return next(line.split(":")[5] for line in lines if line.split(":")[2] == self.user)


def _wheel_folders() -> list[str]:
    """Folders of this machine that pip is told to find packages in; of a package index, all that lies beside it too."""
    named = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    folders = map(Path, re.findall(r"(?:file://)?(/[\w./-]+)", named.stdout))
    tops = {folder.parent if folder.name == "simple" else folder for folder in folders if folder.is_dir()}
    return sorted(map(str, tops))


def build(dockerfile: Path, root: Path, context: Path) -> Image:
    """Carry out every instruction. RuntimeError with the end of its output for the first RUN that fails."""
    image = Image(root)
    for instruction in read_dockerfile(dockerfile):
        print(f"{instruction.name} {instruction.value[:150]}", flush=True)
        _carry_out(instruction, image, context)
    return image


def _carry_out(instruction: Instruction, image: Image, context: Path) -> None:
    value = instruction.value
    match instruction.name:
        case "FROM":
            _bootstrap(value, image.root)
        case "RUN":
            done = image.run(["/bin/sh", "-c", value])
            if done.returncode:
                raise RuntimeError(f"RUN {value}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        case "COPY":
            _copy(value.split(), image, context)
        case "ENV":
            image.environment |= _assignments(value, image.environment)
        case "ARG":
            image.environment |= {k: v for k, v in _assignments(value, {}).items() if k not in image.environment}
        case "WORKDIR":
            image.workdir = value
            _inside(image.root, value).mkdir(parents=True, exist_ok=True)
        case "USER":
            image.user = value
        case "CMD":
            image.command = exec_form(value)
        case "HEALTHCHECK":
            image.health = exec_form(value)
        case "VOLUME" | "EXPOSE":
            pass  # nothing of a build


def _bootstrap(base: str, root: Path) -> None:
    found = re.fullmatch(r"debian:(\d+)\.\d+-slim", base)
    if not found:
        raise ValueError(f"cannot make {base}; a Debian is asked for")
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", RELEASES[found[1]], str(root)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"debootstrap: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    root.chmod(0o755)  # a folder that pytest makes is its owner's alone; the image's user is another
    for name in NETWORK_FILES:  # so that apt and pip find their registries as they do here
        source, target = Path("/", name), root / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, symlinks=True, ignore_dangling_symlinks=True)
        elif source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    if certificates := os.environ.get("PIP_CERT"):
        shutil.copy(certificates, root / CERTIFICATES[1:])
    for name in _wheel_folders():
        (root / name[1:]).mkdir(parents=True, exist_ok=True)


def _assignments(value: str, environment: dict[str, str]) -> dict[str, str]:
    words = [word.partition("=") for word in shlex.split(value)]
    return {key: string.Template(text).safe_substitute(environment) for key, equals, text in words if equals}


def _copy(words: list[str], image: Image, context: Path) -> None:
    """Files into a folder; what a folder holds into a folder."""
    *sources, target = [word for word in words if not word.startswith("--")]
    folder = _inside(image.root, os.path.join(image.workdir, target))
    for source in sources:
        base = Path(os.path.normpath(source))
        names = [name for name in sent(context) if base in (Path("."), Path(name)) or base in Path(name).parents]
        if not names:
            raise ValueError(f"COPY {source}: nothing of that name in the build context")
        for name in names:
            inner = Path(name).name if base == Path(name) else Path(name).relative_to(base)
            (folder / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(context / name, folder / inner)


def _inside(root: Path, path: str) -> Path:
    return root / os.path.normpath(path).lstrip("/")


if __name__ == "__main__":
    made = build(Path(sys.argv[1]), Path(sys.argv[2]), Path.cwd())
    print(json.dumps({"user": made.user, "workdir": made.workdir, "command": made.command}, indent=1))
