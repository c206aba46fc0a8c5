// SPDX-License-Identifier: GPL-2.0
//! What children see of the hypervisor, from the table that the hypervisor itself is held against.

use crate::table::render;
use hv_abi::features::{Feature, Given, FEATURES};
use serde_json::{json, Value};

fn given(feature: &Feature) -> String {
    match feature.given {
        Given::Always => "always".into(),
        Given::Feature(bit) => format!("feature {bit}"),
        Given::InvariantTsc => "invariant TSC".into(),
    }
}

fn test(feature: &Feature) -> String {
    let (file, name) = feature.test;
    format!("{file}: {name}")
}

/// The table for people. `given` is when a child sees the bit: a feature is a bit of the partition property SYNTHETIC_PROC_FEATURES,
/// which the VMM sets.
pub fn table() -> String {
    let rows: Vec<_> = FEATURES
        .iter()
        .map(|one| {
            vec![
                format!("{:08x} {} {}", one.leaf, one.register.name(), one.bit),
                one.name.into(),
                given(one),
                one.obligation.into(),
                test(one),
            ]
        })
        .collect();
    render(&["bit", "name", "given", "obligation", "test"], &rows)
}

/// The same as a JSON array.
pub fn list() -> Value {
    FEATURES
        .iter()
        .map(|one| {
            json!({
                "leaf": one.leaf,
                "register": one.register.name(),
                "bit": one.bit,
                "name": one.name,
                "given": given(one),
                "obligation": one.obligation,
                "test": test(one),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bit_has_its_line_and_its_object() {
        let table = table();
        assert_eq!(table.lines().count(), FEATURES.len() + 1);
        assert!(table.contains("40000003 EAX 2"), "{table}");
        assert_eq!(list().as_array().unwrap().len(), FEATURES.len());
        assert_eq!(list()[0]["leaf"], 0x4000_0003_u32);
    }
}
