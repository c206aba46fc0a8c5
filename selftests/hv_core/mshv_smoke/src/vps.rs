// SPDX-License-Identifier: GPL-2.0
//! The life of virtual processors.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use mshv_bindings::*;
use mshv_ioctls::VcpuFd;
use mshv_smoke::machine::{self, errno, ioctl, kind, Machine};

use super::Outcome;

/// Hypercalls and their answers.
const CREATE_VP: u64 = 0x4e;
const DELETE_VP: u64 = 0x4f;
const SUCCESS: u64 = 0;
const INVALID_PARAMETER: u64 = 5;
const INVALID_PARTITION_STATE: u64 = 7;
const INVALID_VP_INDEX: u64 = 0xe;

/// A VP belongs to its partition, not to its file, and no VMM can delete it.
pub fn vp_outlives_its_file() -> Outcome {
    let machine = Machine::new(&[0xf4])?;
    drop(machine.vm.create_vcpu(1)?);
    let again = machine.vm.create_vcpu(1).err().map(|error| error.errno());
    ensure!(again == Some(libc::EEXIST), "created again: {again:?}");
    for fd in [machine.vm.as_raw_fd(), machine.vcpu.as_raw_fd()] {
        let input = [0u64, 1];
        let mut call = mshv_root_hvcall {
            code: 0x4f,
            in_sz: 16,
            in_ptr: input.as_ptr() as u64,
            ..Default::default()
        };
        let got = errno(ioctl(fd, 0xc020_b807, &raw mut call as u64));
        ensure!(got == libc::EINVAL, "deleted by a VMM: errno {got}");
    }
    // The file of a VP keeps the partition.
    let Machine { vcpu, vm, memory } = machine;
    drop(vm);
    let run = vcpu.run().err().map(|error| error.errno());
    ensure!(
        run == Some(libc::EINTR),
        "without the partition's file: {run:?}"
    );
    drop(memory);
    Ok(())
}

/// The errno of a request for a register, 0 for success.
fn register_error(vcpu: &VcpuFd) -> i32 {
    // VP 1.
    let input = [0, 0, 1, 0, hv_register_name_HV_X64_REGISTER_RIP];
    let mut output = [0u64; 2];
    let mut call = mshv_root_hvcall {
        code: 0x50,
        reps: 1,
        in_sz: size_of_val(&input) as u16,
        out_sz: size_of_val(&output) as u16,
        in_ptr: input.as_ptr() as u64,
        out_ptr: output.as_mut_ptr() as u64,
        ..Default::default()
    };
    errno(ioctl(vcpu.as_raw_fd(), 0xc020_b807, &raw mut call as u64))
}

/// Only the root's kernel deletes VPs, so this asks it by the test module.
pub fn deleted_vp_is_gone() -> Outcome {
    let machine = Machine::new(&[0xeb, 0xfe])?; // jmp .
    let other = machine.vm.create_vcpu(1)?;
    let partition = machine::only_partition()?;
    let answers = |code, answer| {
        machine::hypercall(code, &[partition, 1]).map(|(status, _)| status == answer)
    };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| -> Outcome {
        let runner = scope.spawn(|| {
            // A bound for a delete that is never refused.
            for _ in 0..200 {
                match machine.vcpu.run() {
                    Err(error) if error.errno() == libc::EINTR => {}
                    result => {
                        return result
                            .map(|message| kind(&message))
                            .map_err(|error| error.errno())
                    }
                }
                if done.load(Ordering::Acquire) {
                    break;
                }
            }
            Err(libc::EINTR)
        });
        // Between two dispatches nothing keeps the other VP from being deleted.
        let refused = (|| -> Result<bool, Box<dyn std::error::Error>> {
            while !answers(DELETE_VP, INVALID_PARTITION_STATE)? {
                ensure!(answers(CREATE_VP, SUCCESS)?, "neither refused nor deleted");
                if runner.is_finished() {
                    return Ok(false);
                }
            }
            Ok(true)
        })();
        done.store(true, Ordering::Release);
        let ended = runner.join().map_err(|_| "thread")?;
        ensure!(ended == Err(libc::EINTR), "the other VP: {ended:?}");
        ensure!(refused?, "never refused while a VP runs");
        Ok(())
    })?;
    ensure!(register_error(&other) == 0, "it was not there");
    for (step, (code, answer, register)) in [
        (DELETE_VP, SUCCESS, libc::EINVAL),
        (DELETE_VP, INVALID_VP_INDEX, libc::EINVAL),
        (CREATE_VP, SUCCESS, 0),
        (CREATE_VP, INVALID_PARAMETER, 0),
        (DELETE_VP, SUCCESS, libc::EINVAL),
    ]
    .into_iter()
    .enumerate()
    {
        ensure!(answers(code, answer)?, "step {step}: not {answer:?}");
        let got = register_error(&other);
        ensure!(got == register, "step {step}: register gives {got}");
    }
    let run = other.run().err().map(|error| error.errno());
    ensure!(run == Some(libc::EINVAL), "run: {run:?}");
    Ok(())
}
