"""A computer with AMX, emulated: Bochs as a Sapphire Rapids, and Debian's Linux, which has to grant AMX to a process.

Bochs is compiled from the source in Debian's next release, since this one's is too old, with bochs.patch. Kernel, boot
loader and shell are Debian's packages. All of it is kept in .cache/amx.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pycdlib

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "amx"
PATCH = Path(__file__).with_name("bochs.patch")
RELEASE, SOURCE, VERSION = "trixie", "bochs", "3.0+dfsg-1"
PACKAGES = ("isolinux", "syslinux-common", "busybox-static")
KERNEL = "linux-image-cloud-amd64"  # small, and it has a serial console
FEATURES = ("x86-64", "avx", "evex", "amx", "all-optimizations", "cpu-level=6", "pci")
END = "-- end of commands --"
SECONDS = 900.0  # a minute to boot, and then some thirty million instructions a second

# What Bochs lacks or gets wrong beside AMX: ACPI, and `rep movsb` of overlapping memory, which Linux uses where the CPU
# says that it is fast ("fsrm"). Security modules only take time.
KERNEL_OPTIONS = "console=ttyS0 quiet acpi=off lsm=none nokaslr mitigations=off clearcpuid=fsrm"
BOOT = f"DEFAULT l\nPROMPT 0\nTIMEOUT 1\nLABEL l\n KERNEL /KERNEL\n INITRD /FILES\n APPEND {KERNEL_OPTIONS}"
SETTINGS = """
cpu: model=sapphire_rapids, count=1, ips=50000000
memory: guest=1024, host=1024
romimage: file={bochs}/bios/bios.bin-1.13.0
vgaromimage: file={bochs}/bios/vgabios-cirrus.bin-1.13.0
ata0: enabled=1
ata0-master: type=cdrom, path={folder}/disk.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={folder}/console.txt
log: {folder}/bochs.log
display_library: nogui
panic: action=fatal
clock: sync=none
"""


class UnavailableError(Exception):
    """Something is missing here, as the message says: what needs the computer cannot be tested."""


def _command(words: Sequence[str | Path], folder: Path, given: bytes | None = None) -> bytes:
    done = subprocess.run(words, cwd=folder, input=given, capture_output=True, check=False)
    if done.returncode != 0:
        raise UnavailableError(
            f"{' '.join(map(str, words))}:\n{(done.stdout + done.stderr).decode(errors='replace')[-2000:]}"
        )
    return done.stdout


def _mirror() -> str:
    """Where this system's packages come from."""
    words = ("apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages")
    for line in _command(words, CACHE).decode().splitlines():
        origin, _, address = line.partition(" ")
        if origin == "Debian":
            return address
    raise UnavailableError("apt-get knows no mirror of Debian: `apt-get update` may help")


def _source(folder: Path) -> Path:
    """The archive with the source, by package lists of its own: those of the system stay as they are."""
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "sources.list").write_text(f"deb-src {_mirror()} {RELEASE} main\n")
    own = {"Etc::SourceList": folder / "sources.list", "Etc::SourceParts": os.devnull, "State::Lists": lists}
    options = [word for name, value in own.items() for word in ("-o", f"Dir::{name}={value}")]
    _command(["apt-get", *options, "update"], folder)
    _command(["apt-get", *options, "source", "--download-only", "--tar-only", f"{SOURCE}={VERSION}"], folder)
    return next(folder.glob(f"{SOURCE}_*.orig.tar.xz"))


def _compile(folder: Path) -> None:
    """Bochs, in bochs/."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    _command(["tar", "-x", "--strip-components=1", "-f", _source(folder)], tree)
    _command(["patch", "-p1", "-i", PATCH], tree)
    _command(["./configure", "--with-nogui", "--disable-docbook", *(f"--enable-{name}" for name in FEATURES)], tree)
    _command(["make", "-j", "2"], tree)
    tree.rename(folder / "bochs")


def _unpack(folder: Path) -> None:
    """What is booted, in system/."""
    depends = ["apt-cache", "depends", "--important", KERNEL]
    try:
        shown = _command(depends, folder).decode()
    except UnavailableError:
        if os.geteuid() != 0:
            raise
        # A fresh system has no package lists yet, and only root may get them.
        _command(["apt-get", "update"], folder)
        shown = _command(depends, folder).decode()
    kernel = next(word for word in shown.split() if word.startswith("linux-image-") and word != KERNEL)
    packages, parts = folder / "packages", folder / "parts"
    for new in (packages, parts):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
    _command(["apt-get", "download", kernel, *PACKAGES], packages)
    for package in packages.glob("*.deb"):
        _command(["dpkg-deb", "-x", package, parts], folder)
    parts.rename(folder / "system")


def prepare() -> None:
    """Make the computer, where it is not there yet.

    Raises:
        UnavailableError: Debian's package tools, a compiler or a network are missing.
    """
    missing = [tool for tool in ("apt-get", "dpkg-deb", "make", "c++", "patch") if shutil.which(tool) is None]
    if missing:
        raise UnavailableError(f"{', '.join(missing)}: not installed here")
    CACHE.mkdir(parents=True, exist_ok=True)
    if not (CACHE / "bochs").exists():
        _compile(CACHE)
    if not (CACHE / "system").exists():
        _unpack(CACHE)


def _only(pattern: str) -> Path:
    return next((CACHE / "system").glob(pattern))


def _disk(files: Mapping[str, bytes], commands: Sequence[str], folder: Path, without: str) -> None:
    """A disk that boots, runs the commands in a shell and prints END; files lie in its root, and may be run."""
    tree, busybox = folder / "files", "/busybox"
    tree.mkdir()
    script = [f"#!{busybox} sh", f"{busybox} mkdir /proc", f"{busybox} mount -t proc proc /proc"]
    script += [*commands, f"echo {END}", f"{busybox} sleep 9999"]
    content = {"init": "\n".join(script).encode() + b"\n", "busybox": _only("bin/busybox").read_bytes(), **files}
    for name, data in content.items():
        (tree / name).write_bytes(data)
        (tree / name).chmod(0o755)
    names = "\n".join([".", *content]).encode()
    (folder / "initrd").write_bytes(_command([_only("bin/busybox"), "cpio", "-o", "-H", "newc"], tree, names))

    disk = pycdlib.PyCdlib()
    disk.new(interchange_level=3)
    disk.add_file(str(_only("usr/lib/ISOLINUX/isolinux.bin")), "/LOADER.BIN;1")
    disk.add_file(str(_only("usr/lib/syslinux/modules/bios/ldlinux.c32")), "/LDLINUX.C32;1")
    disk.add_file(str(_only("boot/vmlinuz-*")), "/KERNEL.;1")
    disk.add_file(str(folder / "initrd"), "/FILES.;1")
    boot = (BOOT + (f",{without}" if without else "") + "\n").encode()
    disk.add_fp(io.BytesIO(boot), len(boot), "/ISOLINUX.CFG;1")
    disk.add_eltorito("/LOADER.BIN;1", bootcatfile="/BOOT.CAT;1", boot_info_table=True)
    disk.write(str(folder / "disk.iso"))
    disk.close()


def run(files: Mapping[str, bytes], commands: Sequence[str], folder: Path, without: str = "") -> str:
    """What the commands print on the console of the computer.

    Args:
        files: By name; they lie in the root folder, ``/name``, and may be run.
        commands: Lines of a shell that has its own commands and ``/busybox`` alone.
        folder: An empty one.
        without: A feature of the CPU that Linux shall not use, by its name there.

    Raises:
        RuntimeError: It does not boot, or the commands do not end in time.
    """
    _disk(files, commands, folder, without)
    (folder / "settings").write_text(SETTINGS.format(bochs=CACHE / "bochs", folder=folder))
    console, until = folder / "console.txt", time.monotonic() + SECONDS
    with (folder / "output.txt").open("w") as output:
        words = (CACHE / "bochs" / "bochs", "-q", "-f", folder / "settings")
        bochs = subprocess.Popen(words, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while time.monotonic() < until and bochs.poll() is None:
                printed = console.read_text(errors="replace") if console.exists() else ""
                if END in printed:
                    return printed.partition(END)[0]
                time.sleep(1)
        finally:
            bochs.kill()
            bochs.wait()
    log = (folder / "bochs.log").read_text(errors="replace")
    raise RuntimeError(f"the computer came to no end:\n{printed[-2000:]}\n{log[-1000:]}")
