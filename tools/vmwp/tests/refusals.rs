// SPDX-License-Identifier: GPL-2.0
//! The program as users meet it when something is wrong: one clear sentence, the right exit code, no device needed.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};
use vmm_sys_util::tempdir::TempDir;

fn vmwp(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmwp"))
        .args(args)
        .output()
        .unwrap()
}

/// Runs it, checks the exit code, and returns its only line of complaint.
fn complaint(args: &[&str]) -> String {
    let out = vmwp(args);
    assert_eq!(out.status.code(), Some(1));
    let text = String::from_utf8(out.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("vmwp: "), "{text}");
    text
}

/// The smallest file that passes for a 64-bit bzImage.
fn bzimage(dir: &TempDir) -> String {
    let mut image = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x20_0000u32.to_le_bytes());
    let path = dir.as_path().join("vmlinuz");
    std::fs::File::create(&path)
        .unwrap()
        .write_all(&image)
        .unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_missing_kernel() {
    let text = complaint(&["--kernel", "/nonexistent/vmlinuz"]);
    assert!(text.contains("kernel /nonexistent/vmlinuz"), "{text}");
}

#[test]
fn a_folder_as_kernel() {
    assert!(complaint(&["--kernel", "/"]).contains("not a regular file"));
}

#[test]
fn something_that_is_no_kernel() {
    let text = complaint(&["--kernel", env!("CARGO_BIN_EXE_vmwp")]);
    assert!(
        text.contains("ELF") && text.contains("/boot/vmlinuz-"),
        "{text}"
    );
}

#[test]
fn too_little_memory() {
    let dir = TempDir::new().unwrap();
    let text = complaint(&["--kernel", &bzimage(&dir), "--memory", "17M"]);
    assert!(text.contains("--memory 64M"), "{text}");
}

#[test]
fn a_missing_device_with_json() {
    let dir = TempDir::new().unwrap();
    let out = vmwp(&[
        "--kernel",
        &bzimage(&dir),
        "--device",
        "/nonexistent/mshv",
        "--json",
    ]);
    assert_eq!(out.status.code(), Some(1));
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        (&json["outcome"], &json["exit_code"]),
        (&"error".into(), &1.into())
    );
    assert!(
        json["detail"]
            .as_str()
            .unwrap()
            .contains("modprobe hv_core"),
        "{json}"
    );
}

#[test]
fn a_device_that_is_something_else() {
    let dir = TempDir::new().unwrap();
    let text = complaint(&["--kernel", &bzimage(&dir), "--device", "/dev/null"]);
    assert!(text.contains("the hypervisor refused"), "{text}");
}

#[test]
fn wrong_usage_is_exit_code_two() {
    for args in [
        &["--kernel", "k", "--memory", "1"][..],
        &["--kernel", "k", "--vps", "0"],
        &[],
    ] {
        assert_eq!(vmwp(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn help_tells_the_exit_codes() {
    let out = vmwp(&["--help"]);
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains("triple fault"), "{text}");
    assert!(Path::new(env!("CARGO_BIN_EXE_vmwp")).is_file());
}
