// SPDX-License-Identifier: GPL-2.0
//! `docs/hypercalls.md` says what the sources say.

const DOCUMENT: &str = include_str!("../../../docs/hypercalls.md");
const DEFINED: &str = include_str!("../src/hypercall.rs");
const ANSWERED: [&str; 2] = [
    include_str!("../../image/src/hypercall.rs"),
    include_str!("../../image/src/root.rs"),
];

/// Code, name and last column of the rows of all tables, without those of calls that only children make.
fn rows() -> Vec<(u16, &'static str, &'static str)> {
    let (ours, _) = DOCUMENT.split_once("## From a child").unwrap();
    ours.lines()
        .filter_map(|line| {
            let cells: Vec<_> = line
                .strip_prefix("| 0x")?
                .split('|')
                .map(str::trim)
                .collect();
            let code = u16::from_str_radix(cells[0], 16).unwrap();
            Some((code, cells[1], cells[cells.len() - 2]))
        })
        .collect()
}

/// Codes and names that the sources define.
fn definitions() -> Vec<(u16, &'static str)> {
    DEFINED
        .lines()
        .filter_map(|line| {
            let (name, value) = line
                .strip_prefix("    pub const ")?
                .split_once(": u16 = 0x")?;
            let code = u16::from_str_radix(value.trim_end_matches(';'), 16).ok()?;
            // Kinds of state pages are numbers of another sort.
            (!["REGISTERS", "INTERCEPT_MESSAGE", "RUN"].contains(&name)).then_some((code, name))
        })
        .collect()
}

#[test]
fn every_call_has_its_row_and_no_other_has() {
    let mut documented: Vec<_> = rows().iter().map(|row| (row.0, row.1)).collect();
    let mut defined = definitions();
    documented.sort_unstable();
    defined.sort_unstable();
    assert!(defined.len() > 20);
    assert_eq!(documented, defined);
}

#[test]
fn a_call_is_answered_unless_its_row_denies_it() {
    for (_, name, status) in rows() {
        let answered = ANSWERED.iter().any(|source| {
            source.lines().map(str::trim).any(|line| {
                ["code::", "private::"].iter().any(|kind| {
                    line.strip_prefix(kind)
                        .and_then(|line| line.strip_prefix(name))
                        .is_some_and(|rest| rest.starts_with(" =>") || rest.starts_with(" if "))
                })
            })
        });
        assert_eq!(answered, !status.starts_with("not answered"), "{name}");
    }
}

#[test]
fn every_feature_has_a_test() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../");
    for feature in &hv_abi::features::FEATURES {
        let (file, name) = feature.test;
        let text = std::fs::read_to_string(format!("{root}{file}")).unwrap();
        assert!(text.contains(name), "{}: no {name} in {file}", feature.name);
    }
}
