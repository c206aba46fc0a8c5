// SPDX-License-Identifier: GPL-2.0
//! The program as users meet it, without a hypervisor: its folders are given by environment variables.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};
use vmm_sys_util::tempdir::TempDir;

const DOCUMENT: &str = r#"{"state":"running","vendor":"vt-x","cpus":[{"cpu":0,"state":"in","exits":{"cpuid":3}}],"extra":[1]}"#;

fn hvctl(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hvctl"))
        .args(args)
        .env("HV_DEBUGFS", dir)
        .env("HV_RUN_DIR", dir.join("run"))
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn with_document() -> TempDir {
    let dir = TempDir::new().unwrap();
    std::fs::create_dir(dir.as_path().join("hv_core")).unwrap();
    std::fs::write(dir.as_path().join("hv_core/status"), DOCUMENT).unwrap();
    dir
}

#[test]
fn status_for_people() {
    let dir = with_document();
    let out = hvctl(dir.as_path(), &["status"]);
    assert!(out.status.success());
    let shown = text(&out.stdout);
    assert!(shown.starts_with("Hypervisor  running (vt-x)\n"), "{shown}");
    assert!(shown.contains("cpuid 3"), "{shown}");
}

#[test]
fn status_as_json_is_the_document_of_the_module_with_all_its_fields() {
    let dir = with_document();
    let out = hvctl(dir.as_path(), &["status", "--json"]);
    let shown: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(shown, serde_json::from_str::<Value>(DOCUMENT).unwrap());
}

#[test]
fn without_a_document_there_is_one_sentence_and_with_json_an_object() {
    let dir = TempDir::new().unwrap();
    let out = hvctl(dir.as_path(), &["status"]);
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(text(&out.stderr).lines().count(), 1);
    let out = hvctl(dir.as_path(), &["--json", "status"]);
    let shown: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(shown["error"].is_string(), "{shown}");
}

#[test]
fn nothing_runs_at_first() {
    let dir = TempDir::new().unwrap();
    assert!(text(&hvctl(dir.as_path(), &["ls"]).stdout).contains("no partitions run"));
    assert_eq!(
        text(&hvctl(dir.as_path(), &["ls", "--json"]).stdout),
        "[]\n"
    );
    let out = hvctl(dir.as_path(), &["stop", "x"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("hvctl ls"));
}

#[test]
fn pages_and_completion_are_generated() {
    let dir = TempDir::new().unwrap();
    let pages = dir.as_path().join("man");
    assert!(hvctl(dir.as_path(), &["man", pages.to_str().unwrap()])
        .status
        .success());
    assert!(pages.join("hvctl-run.1").is_file());
    let out = hvctl(dir.as_path(), &["completion", "bash"]);
    assert!(text(&out.stdout).contains("_hvctl"));
}
