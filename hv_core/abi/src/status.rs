// SPDX-License-Identifier: GPL-2.0
//! Hypercall status codes (TLFS, appendix "Hypercall Status Codes").

/// The 16-bit status of a hypercall, as in bits 15:0 of the result value (TLFS 3.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct HvStatus(pub u16);

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $value:expr;)*) => {
        impl HvStatus {
            $($(#[$doc])* pub const $name: Self = Self($value);)*

            /// The TLFS name of the status without its `HV_STATUS_` prefix, or `None` for a value that
            /// this hypervisor never returns.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    /// The operation succeeded.
    SUCCESS = 0x0000;
    /// The hypercall code is not recognised.
    INVALID_HYPERCALL_CODE = 0x0002;
    /// The rep count or the control word is wrong.
    INVALID_HYPERCALL_INPUT = 0x0003;
    /// A parameter page is not aligned.
    INVALID_ALIGNMENT = 0x0004;
    /// A parameter is invalid.
    INVALID_PARAMETER = 0x0005;
    /// The caller lacks the privilege.
    ACCESS_DENIED = 0x0006;
    /// The partition is in the wrong state for the operation.
    INVALID_PARTITION_STATE = 0x0007;
    /// The operation is not possible in this state.
    OPERATION_DENIED = 0x0008;
    /// The property does not exist.
    UNKNOWN_PROPERTY = 0x0009;
    /// The property exists, its new value is out of range.
    PROPERTY_VALUE_OUT_OF_RANGE = 0x000a;
    /// The partition's memory pool lacks pages: deposit and repeat.
    INSUFFICIENT_MEMORY = 0x000b;
    /// There is no such partition.
    INVALID_PARTITION_ID = 0x000d;
    /// There is no such virtual processor.
    INVALID_VP_INDEX = 0x000e;
    /// There is no such port.
    INVALID_PORT_ID = 0x0011;
    /// There is no such connection.
    INVALID_CONNECTION_ID = 0x0012;
    /// There is no room for the message.
    INSUFFICIENT_BUFFERS = 0x0013;
    /// The virtual processor is in the wrong state.
    INVALID_VP_STATE = 0x0015;
    /// A resource other than memory ran out.
    NO_RESOURCES = 0x001d;
    /// The processor lacks a feature that the operation needs.
    PROCESSOR_FEATURE_NOT_SUPPORTED = 0x0020;
    /// A register value is not acceptable to the processor.
    INVALID_REGISTER_VALUE = 0x0050;
    /// The hypervisor stopped because of an internal fault.
    HYPERVISOR_FAULT = 0x00ff;
}

impl HvStatus {
    /// Whether the operation succeeded.
    pub const fn is_success(self) -> bool {
        self.0 == 0
    }
}
