# SPDX-License-Identifier: GPL-2.0
"""The beds: the machines that tests run on. To add one, add a row to BEDS at the end."""

import os
import re
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

# Errors that leave a CPU in an unknown state end the guest at once.
KERNEL_ARGS = "console=ttyS0,115200 loglevel=4 oops=panic panic=-1 random.trust_cpu=on"


@dataclass(frozen=True)
class Bed:
    """A machine.

    boot: seconds of wall time that booting may take; slow: how much longer a test may take than on the
    fastest bed; kernel_args: what this machine needs on the kernel command line; asked_for: it runs only when named;
    counts: one CPU whose TSC counts its instructions exactly, which gets only the tests that name it.
    """

    name: str
    proves: str
    boot: int
    slow: int = 1
    kernel_args: str = ""
    compress: bool = False
    counts: bool = False
    asked_for: bool = False

    def refusal(self):
        """Why it cannot run here; empty when it can."""
        return ""

    def start(self, work, kernel, initrd, kernel_args, child):
        """Prepares the machine in folder `work` and gives the command that runs it. The machine writes its
        kernel's console into console.log and the test results into tap.log. `child`: a whole system is to run as a child."""
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

    def start(self, work, kernel, initrd, kernel_args, child):
        return [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            *self.machine,
            "-kernel", kernel, "-initrd", initrd, "-append", self.append(kernel_args),
            "-serial", f"file:{work}/console.log", "-serial", f"file:{work}/tap.log",
            "-monitor", f"unix:{work}/monitor,server=on,wait=off",
        ]

    def explain(self, work):
        """The registers of all CPUs, without those of the FPU."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(10)
            try:
                monitor.connect(f"{work}/monitor")
                monitor.sendall(b"info registers -a\nquit\n")
                lines = b"".join(iter(lambda: monitor.recv(65536), b"")).decode(errors="replace").splitlines()
                return [line for line in lines if not re.match(r".*\x1b|FCW|FPR|[XYZ]MM|Opmask|$", line)]
            except OSError as error:
                return [f"no answer from the monitor: {error}"]


# What the processor of a virtual machine offers, asked by real-mode code that runs in place of its firmware: bit 0 of the
# value written to port 0xf4 is VMX, bit 1 SVM, bit 4 is always set. QEMU's exit status is twice that and one.
ASK_CPU = bytes.fromhex(
    "66b801000000 0fa2 c1e905 83e101 89ce"  # mov eax, 1; cpuid; shr cx, 5; and cx, 1; mov si, cx
    "66b801000080 0fa2 d1e9 83e102 09f1"    # mov eax, 0x80000001; cpuid; shr cx, 1; and cx, 2; or cx, si
    "88c8 0c10 e6f4 f4")                    # mov al, cl; or al, 0x10; out 0xf4, al; hlt


def offered(accel):
    """Runs that in a machine with these arguments: the bits, or None when the machine did not answer."""
    firmware = bytearray(0x10000)
    firmware[0xff00:0xff00 + len(ASK_CPU)] = ASK_CPU
    firmware[0xfff0:0xfff3] = bytes.fromhex("e90dff")  # the reset vector: jmp 0xff00
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(firmware)
        file.flush()
        try:
            status = subprocess.run(
                ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", *accel,
                 "-bios", file.name, "-device", "isa-debug-exit,iobase=0xf4,iosize=1"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=10).returncode
        except subprocess.TimeoutExpired:
            return None
    return status >> 1 & 3 if status & ~6 == 0x21 else None


@dataclass(frozen=True)
class Kvm(Qemu):
    """The processor of this host by KVM, where it offers its own extension to virtual machines."""

    def refusal(self):
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            return "/dev/kvm is not there, or not for this user"
        bits = offered(self.machine)
        if bits is None:
            return "a virtual machine of KVM does not run"
        return "" if bits else "KVM offers neither VT-x nor AMD-V to virtual machines (kvm_intel or kvm_amd with nested=1)"


@dataclass(frozen=True)
class Bochs(Bed):
    """A CPU model of Bochs. It boots from a CD."""

    cpu: str = ""
    cpus: int = 2
    megs: int = 1024
    compress: bool = True

    def start(self, work, kernel, initrd, kernel_args, child):
        # With several CPUs, Bochs commits RIP after an exception only when the CPU has its next turn. If an interrupt or a
        # timer ends the guest's run before that, the exit stores the old RIP beside the new CS and RSP.
        cpus = 1 if child else self.cpus
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
cpu: model={self.cpu}, count={cpus}, ips=100000000, reset_on_triple_fault=0
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
info: action=ignore
""")
        return ["bochs", "-q", "-f", f"{work}/bochsrc"]


# The models' CPUID claims gigahertz, but their TSC counts instructions: 100 million in a second of the machine's other clocks.
BOCHS_TIME = "tsc=unstable tsc_early_khz=100000"

Q35 = ["-machine", "q35", "-cpu", "max", "-m", "1G"]
IOMMU = ["-device", "intel-iommu,intremap=on,eim=on"]
# One thread for both: with a thread for each, on a busy host, about one boot of a child in ten got stuck, in two ways (docs/beds.md).
TWO_CPUS = ["-accel", "tcg,thread=single", "-smp", "2"]
COUNTED_CPU = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"]

BEDS = {bed.name: bed for bed in [
    # On a busy host QEMU's timer can miss the kernel's check of its interrupt, and the kernel panics.
    Qemu("svm", "AMD-V, IOMMU (QEMU)", boot=120, kernel_args="no_timer_check", machine=[*Q35, *TWO_CPUS, *IOMMU]),
    Kvm("kvm", "VT-x or AMD-V of this host, nested (KVM)", boot=120, asked_for=True,
        machine=["-machine", "q35", "-accel", "kvm", "-cpu", "host", "-smp", "2", "-m", "1G"]),
    Bochs("vmx", "VT-x (Bochs tigerlake: EPT, VPID, CET)", boot=400, slow=8, kernel_args=BOCHS_TIME, cpu="tigerlake"),
    Bochs("vmx-skylake", "VT-x without CET, with page-table isolation (Bochs corei7_skylake_x)", boot=400, slow=8,
          kernel_args=BOCHS_TIME, cpu="corei7_skylake_x"),
    Bochs("vmx-arrow", "VT-x with APICv, posted interrupts, LASS (Bochs arrow_lake)", boot=400, slow=8,
          kernel_args=BOCHS_TIME, cpu="arrow_lake"),
    Bochs("svm-full", "AMD-V with nRIP save, flush by ASID (Bochs ryzen)", boot=400, slow=8,
          kernel_args=BOCHS_TIME, cpu="ryzen"),
    Qemu("svm-count", "instructions of AMD-V exits (QEMU, one CPU)", boot=300, slow=4, kernel_args="no_timer_check", asked_for=True,
         counts=True, machine=[*Q35, *COUNTED_CPU]),
    Bochs("vmx-count", "instructions of VT-x exits (Bochs tigerlake, one CPU)", boot=400, slow=8, kernel_args=BOCHS_TIME,
          asked_for=True, counts=True, cpu="tigerlake", cpus=1),
]}
