# SPDX-License-Identifier: GPL-2.0
"""Makes the small root file system that a bed's guest boots from: busybox, modules, tests."""

import gzip
import lzma
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path


class Archive:
    """A cpio archive of the kind the kernel unpacks ("newc"). Everything in it belongs to root."""

    def __init__(self):
        self._data = bytearray()
        self._seen = {""}
        self._inode = 0

    def _entry(self, name, mode, body=b""):
        self._inode += 1
        fields = [self._inode, mode, 0, 0, 1, 0, len(body), 0, 0, 0, 0, len(name) + 1, 0]
        self._data += b"070701" + b"".join(b"%08x" % f for f in fields) + name.encode() + b"\0"
        self._data += bytes(-len(self._data) % 4) + body
        self._data += bytes(-len(self._data) % 4)

    def folder(self, name):
        """Adds a folder and those above it, once."""
        if name not in self._seen:
            self.folder(os.path.dirname(name))
            self._seen.add(name)
            self._entry(name, stat.S_IFDIR | 0o755)

    def file(self, name, body, executable=False):
        """Adds a file with the given content."""
        self.folder(os.path.dirname(name))
        self._entry(name, stat.S_IFREG | (0o755 if executable else 0o644), body)

    def link(self, name, target):
        """Adds a symbolic link."""
        self.folder(os.path.dirname(name))
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def console(self):
        """Adds /dev/console, which the kernel opens for the first process."""
        self.folder("dev")
        name, self._inode = "dev/console", self._inode + 1
        fields = [self._inode, stat.S_IFCHR | 0o600, 0, 0, 1, 0, 0, 0, 0, 5, 1, len(name) + 1, 0]
        self._data += b"070701" + b"".join(b"%08x" % f for f in fields) + name.encode() + b"\0"
        self._data += bytes(-len(self._data) % 4)

    def bytes(self):
        """The whole archive."""
        whole = Archive()
        whole._data = bytearray(self._data)
        whole._entry("TRAILER!!!", 0)
        return bytes(whole._data)


class StockModules:
    """The modules of the stock kernel, and what each depends on."""

    def __init__(self, image, release):
        self.base = Path(image) / "lib/modules" / release
        self.depends = {}
        self.path = {}
        for line in (self.base / "modules.dep").read_text().splitlines():
            path, needs = line.split(":")
            self.path[self.name(path)] = path
            self.depends[self.name(path)] = [self.name(n) for n in needs.split()]

    @staticmethod
    def name(path):
        """kernel/arch/x86/kvm/kvm-amd.ko.xz is called kvm_amd."""
        return Path(path).name.split(".")[0].replace("-", "_")

    def closure(self, names):
        """The modules of these names and all that they need. Names that are built into the kernel give nothing."""
        found = []
        for name in names:
            if name in self.path:
                found += [n for n in [name, *self.depends[name]] if n not in found]
        return found

    def read(self, name):
        """A module's content, unpacked."""
        path = self.base / self.path[name]
        data = path.read_bytes()
        return lzma.decompress(data) if path.suffix == ".xz" else data

    def add(self, names, archive, where):
        """Puts modules of these names, and all that they need, into the folder `where`. Gives their lines of modules.dep."""
        lines = []
        for name in self.closure(names):
            archive.file(f"{where}/{name}.ko", self.read(name))
            lines.append(f"{name}.ko:" + "".join(f" {n}.ko" for n in self.depends[name]))
        return lines


def stripped(path, scratch):
    """A module without debug information, which would make the guest's memory and boot larger."""
    copy = Path(scratch) / Path(path).name
    shutil.copy(path, copy)
    subprocess.run(["strip", "-g", copy], check=True)
    return copy.read_bytes()


def make_child(out, tree, image, modules):
    """Writes the root file system of a child partition to `out`: busybox, checksum, the first process, and modules of its kernel.

    image: the child's kernel; modules: names.
    """
    archive = Archive()
    archive.console()
    for name in ("proc", "sys", "dev"):
        archive.folder(name)
    archive.file("bin/busybox", Path(shutil.which("busybox")).read_bytes(), executable=True)
    archive.file("bin/checksum", (Path(tree) / "build/selftests/hv_core/checksum").read_bytes(), executable=True)
    archive.file("init", (Path(tree) / "selftests/child-init").read_bytes(), executable=True)
    archive.file("devices", (Path(tree) / "selftests/child-devices").read_bytes())
    if modules:
        release = next((Path(image) / "lib/modules").iterdir()).name
        where = f"lib/modules/{release}"
        lines = StockModules(image, release).add(modules, archive, where)
        archive.file(f"{where}/modules.dep", ("\n".join(lines) + "\n").encode())
    Path(out).write_bytes(gzip.compress(archive.bytes(), 9))


def qemu_files():
    """QEMU and all that it opens, as {path in the guest: path here}."""
    program = "/usr/bin/qemu-system-x86_64"
    needs = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    firmware = ["seabios/bios-256k.bin", "qemu/kvmvapic.bin", "qemu/linuxboot_dma.bin"]
    paths = [*re.findall(r"(/\S+) \(", needs), *(f"/usr/share/{name}" for name in firmware)]
    return {"bin/qemu-system-x86_64": program} | {path.lstrip("/"): path for path in paths}


def make(out, tree, image, release, stock, built, extra, scratch, compress):
    """Writes the archive to `out`.

    tree: the project; image, release: the stock kernel; stock: names of its modules to take along;
    built: our modules (paths); extra: {path in the guest: path here} of programs to take along.
    """
    archive = Archive()
    archive.console()
    for name in ("proc", "sys", "tmp", "run"):
        archive.folder(name)
    busybox = shutil.which("busybox")
    archive.file("bin/busybox", Path(busybox).read_bytes(), executable=True)
    archive.link("sbin", "bin")

    selftests = Path(tree) / "selftests"
    archive.file("init", (selftests / "init").read_bytes(), executable=True)
    archive.file("selftests/bad-log", (selftests / "bad-log").read_bytes())
    for script in sorted([*selftests.glob("*.sh"), *selftests.glob("*/*.sh")]):
        archive.file(f"selftests/{script.relative_to(selftests)}", script.read_bytes(), executable=True)
    for inside, path in extra.items():
        archive.file(inside, Path(path).read_bytes(), executable=True)

    where = f"lib/modules/{release}"
    order = StockModules(image, release).add(["configfs", *stock], archive, where)
    for path in built:
        archive.file(f"{where}/{Path(path).name}", stripped(path, scratch))
        order.append(f"{Path(path).name}:")
    archive.file(f"{where}/modules.dep", ("\n".join(order) + "\n").encode())

    data = archive.bytes()
    Path(out).write_bytes(gzip.compress(data, 1) if compress else data)
