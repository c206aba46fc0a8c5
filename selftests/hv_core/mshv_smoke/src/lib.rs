// SPDX-License-Identifier: GPL-2.0
//! What the programs that test `/dev/mshv` share.

pub mod machine;
