# SPDX-License-Identifier: GPL-2.0
"""The beds: the machines that tests run on. To add one, add a row to BEDS at the end."""

import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

# Errors that leave a CPU in an unknown state end the guest at once.
KERNEL_ARGS = "console=ttyS0,115200 loglevel=4 oops=panic panic=-1 random.trust_cpu=on"


@dataclass(frozen=True)
class Bed:
    """A machine.

    boot: seconds of wall time that booting may take; slow: how much longer a test may take than on the
    fastest bed; kernel_args: what this machine needs on the kernel command line; counts: one CPU whose TSC counts its
    instructions exactly, for measuring and not for tests that come of themselves.
    """

    name: str
    proves: str
    boot: int
    slow: int = 1
    kernel_args: str = ""
    compress: bool = False
    counts: bool = False

    def start(self, work, kernel, initrd, kernel_args):
        """Prepares the machine in folder `work` and gives the command that runs it. The machine writes its
        kernel's console into console.log and the test results into tap.log."""
        raise NotImplementedError

    def explain(self, work):
        """What a machine in folder `work` that ran out of time is doing, as lines. It may end the machine."""
        return []

    def append(self, more):
        """The kernel command line."""
        return " ".join(filter(None, [KERNEL_ARGS, self.kernel_args, f"hvbed={self.name}", more]))


@dataclass(frozen=True)
class Qemu(Bed):
    """QEMU's own CPU (TCG): AMD-V, and an IOMMU with interrupt remapping."""

    machine: list = field(default_factory=list)

    def start(self, work, kernel, initrd, kernel_args):
        return [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            *self.machine,
            "-kernel", kernel, "-initrd", initrd, "-append", self.append(kernel_args),
            "-serial", f"file:{work}/console.log", "-serial", f"file:{work}/tap.log",
            "-monitor", f"unix:{work}/monitor,server=on,wait=off",
        ]

    def explain(self, work):
        """The registers of all CPUs."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(10)
            try:
                monitor.connect(f"{work}/monitor")
                monitor.sendall(b"info registers -a\nquit\n")
                lines = b"".join(iter(lambda: monitor.recv(65536), b"")).decode(errors="replace").splitlines()
                return [line for line in lines if "\x1b" not in line]
            except OSError as error:
                return [f"no answer from the monitor: {error}"]


@dataclass(frozen=True)
class Bochs(Bed):
    """A CPU model of Bochs. It boots from a CD."""

    cpu: str = ""
    cpus: int = 2
    megs: int = 1024
    compress: bool = True

    def start(self, work, kernel, initrd, kernel_args):
        iso = Path(work) / "iso"
        shutil.rmtree(iso, ignore_errors=True)
        (iso / "isolinux").mkdir(parents=True)
        shutil.copy(kernel, iso / "vmlinuz")
        shutil.copy(initrd, iso / "initrd")
        shutil.copy("/usr/lib/ISOLINUX/isolinux.bin", iso / "isolinux")
        shutil.copy("/usr/lib/syslinux/modules/bios/ldlinux.c32", iso / "isolinux")
        (iso / "isolinux/isolinux.cfg").write_text(
            "default linux\nprompt 0\ntimeout 1\nlabel linux\n kernel /vmlinuz\n"
            f" append initrd=/initrd {self.append(kernel_args)}\n")
        subprocess.run(
            ["xorriso", "-as", "mkisofs", "-quiet", "-o", f"{work}/cd.iso", "-b", "isolinux/isolinux.bin",
             "-c", "isolinux/boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", iso],
            check=True, stderr=subprocess.DEVNULL)
        shutil.rmtree(iso)
        # One tick of time for each instruction (sync=none); power-off is reported as a panic, which ends Bochs.
        Path(work, "bochsrc").write_text(f"""\
display_library: rfb, options="timeout=0"
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
megs: {self.megs}
cpu: model={self.cpu}, count={self.cpus}, ips=100000000, reset_on_triple_fault=0
clock: sync=none
ata0: enabled=1
ata0-master: type=cdrom, path={work}/cd.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={work}/console.log
com2: enabled=1, mode=file, dev={work}/tap.log
sound: driver=dummy
log: {work}/bochs.log
panic: action=fatal
error: action=report
""")
        return ["bochs", "-q", "-f", f"{work}/bochsrc"]


# The models' CPUID claims gigahertz, but their TSC counts instructions: 100 million in a second of the machine's other clocks.
BOCHS_TIME = "tsc=unstable tsc_early_khz=100000"

Q35 = ["-machine", "q35", "-cpu", "max", "-m", "1G"]
IOMMU = ["-device", "intel-iommu,intremap=on,eim=on"]
TWO_CPUS = ["-accel", "tcg,thread=multi", "-smp", "2"]
COUNTED_CPU = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"]

BEDS = {bed.name: bed for bed in [
    # On a busy host QEMU's timer can miss the kernel's check of its interrupt, and the kernel panics.
    Qemu("svm", "AMD-V, IOMMU (QEMU)", boot=120, kernel_args="no_timer_check", machine=[*Q35, *TWO_CPUS, *IOMMU]),
    Bochs("vmx", "VT-x (Bochs tigerlake: EPT, VPID, CET)", boot=400, slow=8, kernel_args=BOCHS_TIME, cpu="tigerlake"),
    Bochs("vmx-skylake", "VT-x without CET, with page-table isolation (Bochs corei7_skylake_x)", boot=400, slow=8,
          kernel_args=BOCHS_TIME, cpu="corei7_skylake_x"),
    Bochs("vmx-arrow", "VT-x with APICv, posted interrupts, LASS (Bochs arrow_lake)", boot=400, slow=8,
          kernel_args=BOCHS_TIME, cpu="arrow_lake"),
    Bochs("svm-full", "AMD-V with nRIP save, flush by ASID (Bochs ryzen)", boot=400, slow=8,
          kernel_args=BOCHS_TIME, cpu="ryzen"),
    Qemu("svm-count", "instructions of AMD-V exits (QEMU, one CPU)", boot=300, slow=4, kernel_args="no_timer_check", counts=True,
         machine=[*Q35, *COUNTED_CPU]),
    Bochs("vmx-count", "instructions of VT-x exits (Bochs tigerlake, one CPU)", boot=400, slow=8, kernel_args=BOCHS_TIME,
          counts=True, cpu="tigerlake", cpus=1),
]}
