// SPDX-License-Identifier: GPL-2.0
//! Barriers against speculation between partitions: which ones the world switch has, decided by what the host's kernel decided.

/// What the host's kernel found and chose, as the loader reads it.
pub mod host {
    /// IA32_SPEC_CTRL exists.
    pub const SPEC_CTRL: u32 = 1 << 0;
    /// The kernel writes IBRS at each of its entries (`spectre_v2=ibrs`): there, only a write is a barrier.
    pub const KERNEL_IBRS: u32 = 1 << 1;
    /// IA32_PRED_CMD has IBPB.
    pub const IBPB: u32 = 1 << 2;
    /// Branch targets leak between programs (Spectre variant 2).
    pub const SPECTRE_V2: u32 = 1 << 3;
    /// IBPB at each VM exit (Retbleed, SRSO), or before the next return to a program (VMScape).
    pub const IBPB_AFTER_GUEST: u32 = 1 << 4;
    /// VERW before VM entries (MDS, TAA, MMIO stale data, RFDS, TSA).
    pub const CLEAR_BUFFERS: u32 = 1 << 5;
    /// The return stack is filled after VM exits.
    pub const FILL_RETURN_STACK: u32 = 1 << 6;
    /// L1 terminal fault.
    pub const L1TF: u32 = 1 << 7;
    /// IA32_FLUSH_CMD exists.
    pub const FLUSH_L1D: u32 = 1 << 8;
    /// `mitigations=off`.
    pub const OFF: u32 = 1 << 9;
    /// A hypervisor beneath this one flushes the L1 data cache (IA32_ARCH_CAPABILITIES bit 3).
    pub const FLUSHED_BELOW: u32 = 1 << 10;
}

/// What the world switch does.
pub mod action {
    /// IA32_SPEC_CTRL is the root's, and while a child runs also has what the child set.
    pub const SPEC_CTRL: u32 = 1 << 0;
    /// It is written on the way back even if it has the right value.
    pub const WRITE_SPEC_CTRL: u32 = 1 << 1;
    /// IBPB when another partition's VP ran on the CPU last.
    pub const IBPB_BETWEEN_CHILDREN: u32 = 1 << 2;
    /// IBPB on the way back to the root.
    pub const IBPB_TO_ROOT: u32 = 1 << 3;
    /// VERW on the way to a child.
    pub const CLEAR_BUFFERS: u32 = 1 << 4;
    /// Flush of the L1 data cache on the way to a child.
    pub const FLUSH_L1D: u32 = 1 << 5;
    /// The return stack is filled on the way back to the root.
    pub const FILL_RETURN_STACK: u32 = 1 << 6;
}

/// Names of the actions, for the status.
pub const NAMES: [(u32, &str); 7] = [
    (action::SPEC_CTRL, "spec_ctrl"),
    (action::WRITE_SPEC_CTRL, "ibrs_write"),
    (action::IBPB_BETWEEN_CHILDREN, "ibpb_between_children"),
    (action::IBPB_TO_ROOT, "ibpb_to_root"),
    (action::CLEAR_BUFFERS, "verw"),
    (action::FLUSH_L1D, "l1d_flush"),
    (action::FILL_RETURN_STACK, "rsb_fill"),
];

/// What the world switch does on a host like that.
#[must_use]
pub const fn decide(found: u32) -> u32 {
    /// What is needed of what was found, what must not be there, and what follows.
    const TABLE: [(u32, u32, u32); 7] = [
        // Not a matter of mitigations: a register that the child can set is the child's.
        (host::SPEC_CTRL, 0, action::SPEC_CTRL),
        (
            host::SPEC_CTRL | host::KERNEL_IBRS,
            0,
            action::WRITE_SPEC_CTRL,
        ),
        (
            host::IBPB | host::SPECTRE_V2,
            host::OFF,
            action::IBPB_BETWEEN_CHILDREN,
        ),
        (host::IBPB | host::IBPB_AFTER_GUEST, 0, action::IBPB_TO_ROOT),
        (host::CLEAR_BUFFERS, 0, action::CLEAR_BUFFERS),
        (
            host::L1TF | host::FLUSH_L1D,
            host::OFF | host::FLUSHED_BELOW,
            action::FLUSH_L1D,
        ),
        (host::FILL_RETURN_STACK, 0, action::FILL_RETURN_STACK),
    ];
    let mut actions = 0;
    let mut row = 0;
    while row < TABLE.len() {
        let (needed, unwanted, then) = TABLE[row];
        if found & needed == needed && found & unwanted == 0 {
            actions |= then;
        }
        row += 1;
    }
    actions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_done_where_nothing_was_found() {
        assert_eq!(decide(0), 0);
        // Vulnerable, but without the means.
        assert_eq!(decide(host::SPECTRE_V2 | host::L1TF), 0);
        assert_eq!(decide(host::IBPB_AFTER_GUEST | host::KERNEL_IBRS), 0);
    }

    #[test]
    fn means_alone_are_no_reason() {
        assert_eq!(decide(host::IBPB | host::FLUSH_L1D), 0);
        assert_eq!(
            decide(host::L1TF | host::FLUSH_L1D | host::FLUSHED_BELOW),
            0
        );
    }

    #[test]
    fn each_finding_has_its_barrier() {
        for (found, actions) in [
            (host::SPEC_CTRL, action::SPEC_CTRL),
            (
                host::SPEC_CTRL | host::KERNEL_IBRS,
                action::SPEC_CTRL | action::WRITE_SPEC_CTRL,
            ),
            (host::IBPB | host::SPECTRE_V2, action::IBPB_BETWEEN_CHILDREN),
            (host::IBPB | host::IBPB_AFTER_GUEST, action::IBPB_TO_ROOT),
            (host::CLEAR_BUFFERS, action::CLEAR_BUFFERS),
            (host::L1TF | host::FLUSH_L1D, action::FLUSH_L1D),
            (host::FILL_RETURN_STACK, action::FILL_RETURN_STACK),
        ] {
            assert_eq!(decide(found), actions, "{found:#x}");
        }
    }

    #[test]
    fn without_mitigations_only_the_childs_register_is_left() {
        let all = host::OFF | host::SPEC_CTRL | host::IBPB | host::SPECTRE_V2 | host::L1TF;
        assert_eq!(decide(all | host::FLUSH_L1D), action::SPEC_CTRL);
    }

    #[test]
    fn every_action_has_a_name() {
        let all = NAMES.iter().fold(0, |all, (bit, _)| all | bit);
        assert_eq!(decide(!(host::OFF | host::FLUSHED_BELOW)), all);
    }
}
