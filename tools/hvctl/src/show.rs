// SPDX-License-Identifier: GPL-2.0
//! Status and lists for people.

use crate::partitions::Listed;
use crate::status::Status;
use crate::table::render;
use serde_json::{Map, Value};
use std::fmt::Write;

/// The state of the hypervisor.
pub fn status(s: &Status) -> String {
    let mut out = String::new();
    let mut line = |title: &str, text: String| {
        if !text.is_empty() {
            // Writing to a string cannot fail.
            let _ = writeln!(out, "{title:<11} {text}");
        }
    };
    line("Hypervisor", hypervisor(s));
    line("Refused", s.refusal.clone().unwrap_or_default());
    line("Image", image(s));
    line("Memory", memory(&s.memory));
    let barriers = s.mitigations.as_ref().map(|names| match names[..] {
        [] => "none".into(),
        _ => names.join(", "),
    });
    line("Barriers", barriers.unwrap_or_default());

    let mut section = |header: &[&str], rows: Vec<Vec<String>>| {
        if !rows.is_empty() {
            out.push('\n');
            out.push_str(&render(header, &rows));
        }
    };
    section(
        &["capability", "required", "found", "ok", "why"],
        s.caps
            .iter()
            .map(|c| {
                vec![
                    c.name.clone(),
                    text(&c.required),
                    text(&c.found),
                    yes(c.ok),
                    c.why.clone(),
                ]
            })
            .collect(),
    );
    section(
        &["cpu", "state", "exits", "by reason"],
        s.cpus
            .iter()
            .map(|cpu| {
                let exits = cpu.exits();
                let total: u64 = exits.iter().map(|(_, n)| n).sum();
                let reasons: Vec<_> = exits
                    .iter()
                    .map(|(reason, n)| format!("{reason} {n}"))
                    .collect();
                vec![
                    text(&cpu.cpu),
                    text(&cpu.state),
                    total.to_string(),
                    reasons.join(", "),
                ]
            })
            .collect(),
    );
    let keys = keys(&s.partitions);
    let header: Vec<_> = keys
        .iter()
        .map(|k| k.strip_suffix("_bytes").unwrap_or(k).replace('_', " "))
        .collect();
    section(
        &header.iter().map(String::as_str).collect::<Vec<_>>(),
        s.partitions
            .iter()
            .map(|p| {
                keys.iter()
                    .map(|k| p.get(k).map(|v| amount(k, v)).unwrap_or_default())
                    .collect()
            })
            .collect(),
    );
    out
}

fn hypervisor(s: &Status) -> String {
    match (s.state.as_str(), s.vendor.as_str()) {
        ("", _) => "unknown".into(),
        (state, "") => state.into(),
        (state, vendor) => format!("{state} ({vendor})"),
    }
}

fn image(s: &Status) -> String {
    let mut parts = Vec::new();
    parts.extend(s.image.size.map(bytes));
    parts.extend(
        Some(text(&s.image.base))
            .filter(|t| !t.is_empty())
            .map(|t| format!("at {t}")),
    );
    parts.extend(
        Some(text(&s.image.hash))
            .filter(|t| !t.is_empty())
            .map(|t| format!("hash {t}")),
    );
    parts.extend(
        s.image
            .other
            .iter()
            .map(|(k, v)| format!("{} {}", title(k), amount(k, v))),
    );
    parts.join(", ")
}

fn memory(m: &Map<String, Value>) -> String {
    let parts: Vec<_> = m
        .iter()
        .map(|(k, v)| format!("{} {}", title(k), amount(k, v)))
        .collect();
    parts.join(", ")
}

/// All keys of some objects, in the order of their first appearance.
fn keys(objects: &[Map<String, Value>]) -> Vec<String> {
    let mut keys: Vec<String> = Vec::new();
    for key in objects.iter().flat_map(Map::keys) {
        if !keys.contains(key) {
            keys.push(key.clone());
        }
    }
    keys
}

fn title(key: &str) -> String {
    key.strip_suffix("_bytes").unwrap_or(key).replace('_', " ")
}

/// A value by the unit that its key tells.
fn amount(key: &str, value: &Value) -> String {
    match value.as_u64() {
        Some(n) if key.ends_with("_bytes") => bytes(n),
        _ => text(value),
    }
}

/// A value without the quotes of JSON.
fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(s) => s.clone(),
        Value::Bool(b) => yes(Some(*b)),
        other => other.to_string(),
    }
}

fn yes(b: Option<bool>) -> String {
    match b {
        Some(true) => "yes".into(),
        Some(false) => "NO".into(),
        None => String::new(),
    }
}

/// Bytes in the largest binary unit that keeps them readable.
pub fn bytes(n: u64) -> String {
    const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match UNITS.iter().find(|(_, size)| n >= *size) {
        Some((unit, size)) if n % size == 0 => format!("{} {unit}", n / size),
        Some((unit, size)) => format!("{:.1} {unit}", n as f64 / *size as f64),
        None => format!("{n} B"),
    }
}

/// The running partitions.
pub fn partitions(list: &[Listed]) -> String {
    if list.is_empty() {
        return "no partitions run; start one with `hvctl run`\n".into();
    }
    let rows = list
        .iter()
        .map(|p| match &p.status {
            Some(s) => vec![
                p.name.clone(),
                p.state.clone(),
                s.pid.to_string(),
                s.vps.to_string(),
                bytes(s.memory),
                uptime(s.uptime_ms),
                s.kernel.display().to_string(),
            ],
            None => vec![p.name.clone(), p.state.clone()],
        })
        .collect::<Vec<_>>();
    render(
        &["name", "state", "pid", "vps", "memory", "uptime", "kernel"],
        &rows,
    )
}

fn uptime(ms: u64) -> String {
    let s = ms / 1000;
    match (s / 86_400, s / 3600 % 24, s / 60 % 60, s % 60) {
        (0, 0, 0, s) => format!("{s} s"),
        (0, 0, m, s) => format!("{m} min {s} s"),
        (0, h, m, _) => format!("{h} h {m} min"),
        (d, h, ..) => format!("{d} d {h} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests::RUNNING;
    use vmwp::control;

    fn shown(document: &str) -> String {
        status(&Status::from_document(
            &serde_json::from_str(document).unwrap(),
        ))
    }

    #[test]
    fn a_running_hypervisor_fills_all_tables() {
        let expected = "\
Hypervisor  running (amd-v)
Image       192 KiB, at 0x7c000000, hash 1f2e3d4c, stacks 2
Memory      image 192 KiB, per cpu 48 KiB, pool 4 MiB

CAPABILITY  REQUIRED  FOUND  OK   WHY
svm         yes       yes    yes  runs guests at all
asids       2         16     yes  a tag for each partition

CPU  STATE  EXITS  BY REASON
  0  in        52  vmmcall 40, cpuid 12
  1  in         0

ID  MEMORY   VPS
 2  512 MiB  2
";
        assert_eq!(shown(RUNNING), expected);
    }

    #[test]
    fn barriers_have_names_or_there_are_none() {
        for (list, line) in [
            (r#"["spec_ctrl","verw"]"#, "Barriers    spec_ctrl, verw\n"),
            ("[]", "Barriers    none\n"),
            ("null", ""),
        ] {
            assert_eq!(
                shown(&format!(r#"{{"mitigations":{list}}}"#)),
                format!("Hypervisor  unknown\n{line}")
            );
        }
    }

    #[test]
    fn a_refusal_stands_on_top_and_its_row_shouts() {
        let text = shown(
            r#"{"state":"refused","refusal":"EPT is missing; enable it in the firmware",
                "caps":[{"name":"ept","found":false,"required":true,"ok":false,"why":"second-level tables"}]}"#,
        );
        assert!(
            text.starts_with("Hypervisor  refused\nRefused     EPT is missing"),
            "{text}"
        );
        assert!(
            text.contains("ept         yes       NO     NO  second-level tables"),
            "{text}"
        );
    }

    #[test]
    fn an_empty_document_is_shown_without_empty_sections() {
        assert_eq!(shown("{}"), "Hypervisor  unknown\n");
    }

    #[test]
    fn sizes_and_times_are_readable() {
        let sizes = [0, 512, 1024, 1536, 196_608, 1 << 30, 5 << 30].map(bytes);
        assert_eq!(
            sizes,
            ["0 B", "512 B", "1 KiB", "1.5 KiB", "192 KiB", "1 GiB", "5 GiB"]
        );
        let times = [900, 61_000, 3_700_000, 90_000_000].map(uptime);
        assert_eq!(times, ["0 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"]);
    }

    #[test]
    fn partitions_are_listed_with_dead_ones_told_apart() {
        let alive = control::Status {
            name: "a".into(),
            pid: 7,
            vps: 2,
            memory: 512 << 20,
            uptime_ms: 5000,
            kernel: "/k".into(),
            ..Default::default()
        };
        let list = [
            Listed {
                name: "a".into(),
                state: "running".into(),
                status: Some(alive),
            },
            Listed {
                name: "b".into(),
                state: "dead".into(),
                status: None,
            },
        ];
        let text = partitions(&list);
        assert_eq!(
            text,
            "NAME  STATE    PID  VPS  MEMORY   UPTIME  KERNEL\n\
             a     running  7    2    512 MiB  5 s     /k\n\
             b     dead\n"
        );
        assert!(partitions(&[]).contains("hvctl run"));
    }
}
