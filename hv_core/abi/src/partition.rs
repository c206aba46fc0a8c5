// SPDX-License-Identifier: GPL-2.0
//! Input and output of the hypercalls about partitions, virtual processors and their memory, and the
//! messages that a VP leaves for its VMM.
//!
//! The layouts are those of `include/hyperv/hvhdk.h`, `hvhdk_mini.h`, `hvgdk.h` and `hvgdk_mini.h`;
//! `shim.c` asserts the sizes and offsets against these headers. All values are little endian. Lists that
//! follow a structure (pages, registers, page frames) are named where the structure ends.
#![allow(missing_docs)] // The names of fields are those of the headers.

/// `HV_PARTITION_CREATION_FLAG_*`.
pub mod creation {
    pub const SMT_ENABLED_GUEST: u64 = 1 << 0;
    pub const NESTED_VIRTUALIZATION_CAPABLE: u64 = 1 << 1;
    pub const GPA_SUPER_PAGES_ENABLED: u64 = 1 << 4;
    pub const EXO_PARTITION: u64 = 1 << 8;
    pub const LAPIC_ENABLED: u64 = 1 << 13;
    pub const INTERCEPT_MESSAGE_PAGE_ENABLED: u64 = 1 << 19;
    pub const X2APIC_CAPABLE: u64 = 1 << 22;
}

/// `HV_COMPATIBILITY_21_H2`.
pub const COMPATIBILITY_VERSION: u32 = 0x609;

/// `hv_input_create_partition`. The output is one u64: the partition ID.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct CreatePartition {
    /// [`creation`] flags.
    pub flags: u64,
    pub proximity_domain_info: u64,
    /// [`COMPATIBILITY_VERSION`].
    pub compatibility_version: u32,
    pub padding: u32,
    /// Banks of processor features that the partition shall not have (1 = hide).
    pub disabled_processor_features: [u64; 2],
    /// XSAVE features that the partition shall not have.
    pub disabled_xsave_features: u64,
    /// 0: not isolated.
    pub isolation_properties: u64,
}

/// Input of INITIALIZE_PARTITION, FINALIZE_PARTITION and DELETE_PARTITION; also the head of DEPOSIT_MEMORY,
/// where the page numbers (u64, one per rep) follow.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct PartitionId {
    pub partition_id: u64,
}

/// `hv_input_withdraw_memory`. Rep call; the output is the list of page numbers (u64) given back. Status
/// NO_RESOURCES when none is left.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct WithdrawMemory {
    pub partition_id: u64,
    pub proximity_domain_info: u64,
}

/// `hv_input_get_partition_property` (output u64), and the head of the two below.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct GetPartitionProperty {
    pub partition_id: u64,
    pub property_code: u32,
    pub padding: u32,
}

/// `hv_input_set_partition_property` and `hv_input_get_partition_property_ex` (there `value` is the argument
/// and the output is up to 4072 bytes).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct SetPartitionProperty {
    pub partition_id: u64,
    pub property_code: u32,
    pub padding: u32,
    pub value: u64,
}

/// `HV_PARTITION_PROPERTY_*`.
pub mod property {
    pub const PRIVILEGE_FLAGS: u32 = 0x1_0000;
    pub const SYNTHETIC_PROC_FEATURES: u32 = 0x1_0001;
    pub const TIME_FREEZE: u32 = 0x3_0003;
    pub const REFERENCE_TIME: u32 = 0x3_0005;
    pub const PROCESSORS_PER_SOCKET: u32 = 0x5_0003;
    pub const GPA_PAGE_ACCESS_TRACKING: u32 = 0x5_0005;
    pub const UNIMPLEMENTED_MSR_ACTION: u32 = 0x5_0017;
    pub const PROCESSOR_VENDOR: u32 = 0x6_0000;
    pub const PROCESSOR_XSAVE_FEATURES: u32 = 0x6_0002;
    pub const PHYSICAL_ADDRESS_WIDTH: u32 = 0x6_0006;
    pub const XSAVE_STATES: u32 = 0x6_0007;
    pub const MAX_XSAVE_DATA_SIZE: u32 = 0x6_0008;
    pub const PROCESSOR_CLOCK_FREQUENCY: u32 = 0x6_0009;
    pub const PROCESSOR_FEATURES0: u32 = 0x6_000a;
    pub const PROCESSOR_FEATURES1: u32 = 0x6_000b;
    pub const VMM_CAPABILITIES: u32 = 0x9_0007;
    pub const ASSIGNABLE_SYNTHETIC_PROC_FEATURES: u32 = 0x9_0009;
}

/// `HV_MAP_GPA_*`.
pub mod map {
    pub const READABLE: u32 = 0x1;
    pub const WRITABLE: u32 = 0x2;
    pub const KERNEL_EXECUTABLE: u32 = 0x4;
    pub const USER_EXECUTABLE: u32 = 0x8;
    pub const EXECUTABLE: u32 = 0xc;
    pub const ADJUSTABLE: u32 = 0x8000;
    pub const NO_ACCESS: u32 = 0x1_0000;
    pub const NOT_CACHED: u32 = 0x20_0000;
    pub const LARGE_PAGE: u32 = 0x8000_0000;
}

/// `HV_UNMAP_GPA_*`.
pub mod unmap {
    pub const LARGE_PAGE: u32 = 0x2;
}

/// `hv_input_map_gpa_pages`. Rep call: one page number of the root (u64) per rep follows. With [`map::LARGE_PAGE`] a rep is
/// 2 MiB; all page numbers still count 4 KiB.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct MapGpaPages {
    pub target_partition_id: u64,
    /// First page number in the child. Counts from rep 0, also when the call starts at a later rep.
    pub target_gpa_base: u64,
    /// [`map`] flags.
    pub map_flags: u32,
    pub padding: u32,
}

/// `hv_input_unmap_gpa_pages`. Rep call with an empty list: the rep count is the number of pages, with
/// [`unmap::LARGE_PAGE`] those of 2 MiB.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct UnmapGpaPages {
    pub target_partition_id: u64,
    /// First page number in the child. Counts from rep 0, also when the call starts at a later rep.
    pub target_gpa_base: u64,
    /// [`unmap`] flags.
    pub unmap_flags: u32,
    pub padding: u32,
}

/// `hv_create_vp`. Only the first two fields count.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct CreateVp {
    pub partition_id: u64,
    pub vp_index: u32,
    pub padding: [u8; 3],
    pub subnode_type: u8,
    pub subnode_id: u64,
    pub proximity_domain_info: u64,
    pub flags: u64,
}

/// `hv_input_delete_vp`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct DeleteVp {
    pub partition_id: u64,
    pub vp_index: u32,
    pub reserved: u32,
}

/// Head of GET_VP_REGISTERS, where the names (u32, one per rep) follow and the output is 16 bytes per rep,
/// and of SET_VP_REGISTERS, where one [`RegisterAssoc`] per rep follows.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct VpRegisters {
    pub partition_id: u64,
    pub vp_index: u32,
    pub input_vtl: u8,
    pub rsvd_z8: u8,
    pub rsvd_z16: u16,
}

/// `hv_register_assoc`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct RegisterAssoc {
    pub name: u32,
    pub reserved1: u32,
    pub reserved2: u64,
    /// Low and high half.
    pub value: [u64; 2],
}

/// `hv_input_map_vp_state_page`. The output is one u64: the page number.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct MapVpStatePage {
    pub partition_id: u64,
    pub vp_index: u32,
    /// See [`state_page`](super::hypercall::state_page).
    pub page_type: u16,
    pub input_vtl: u8,
    /// Bit 0: `requested_map_location` is given. The image requires it.
    pub flags: u8,
    /// Page number of a page of the root.
    pub requested_map_location: u64,
}

/// `hv_input_unmap_vp_state_page`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct UnmapVpStatePage {
    pub partition_id: u64,
    pub vp_index: u32,
    pub page_type: u16,
    pub input_vtl: u8,
    pub reserved0: u8,
}

/// `enum hv_get_set_vp_state_type`; bit 31 says that the data goes by page number.
pub mod vp_state {
    pub const LAPIC: u32 = 0x8000_0000;
    pub const XSAVE: u32 = 0x8000_0001;
    pub const SIM_PAGE: u32 = 0x8000_0002;
    pub const SIEF_PAGE: u32 = 0x8000_0003;
    pub const SYNTHETIC_TIMERS: u32 = 4;
    /// Bytes of [`SYNTHETIC_TIMERS`].
    pub const SYNTHETIC_TIMERS_BYTES: usize = 200;
}

/// `hv_input_get_vp_state` and `hv_input_set_vp_state`. Simple calls whose variable header (control bits
/// 26:17, in units of 8 bytes) is the list of page numbers (u64), or for SET of [`vp_state::SYNTHETIC_TIMERS`]
/// the data itself. GET of the timers answers in the output page.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct VpState {
    pub partition_id: u64,
    pub vp_index: u32,
    pub input_vtl: u8,
    pub rsvd0: u8,
    pub rsvd1: u16,
    /// See [`vp_state`].
    pub state_type: u32,
    pub rsvd: u32,
    /// For XSAVE: 0.
    pub xsave_flags: u64,
    /// For XSAVE: components wanted, as in XCR0 and IA32_XSS.
    pub xsave_states: u64,
}

/// `hv_input_assert_virtual_interrupt`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct AssertVirtualInterrupt {
    pub partition_id: u64,
    /// Bits 31:0 type, bit 32 level triggered, bit 33 logical destination. Our own bit 34: the VMM acts on the end of a
    /// level-triggered interrupt.
    pub control: u64,
    /// APIC ID or logical destination.
    pub dest_addr: u64,
    pub vector: u32,
    pub target_vtl: u8,
    pub rsvd_z0: u8,
    pub rsvd_z1: u16,
}

/// `hv_input_signal_event_direct`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct SignalEventDirect {
    pub target_partition: u64,
    pub target_vp: u32,
    pub target_vtl: u8,
    /// Source of the SynIC.
    pub target_sint: u8,
    /// Flag of that source.
    pub flag_number: u16,
}

/// `hv_input_post_message_direct`, up to the message (256 bytes), which is not aligned to 8.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct PostMessageDirect {
    pub partition_id: u64,
    pub vp_index: u32,
    pub vtl: u8,
    pub padding: [u8; 3],
    /// Source of the SynIC.
    pub sint_index: u32,
    /// First four bytes of the message: its type.
    pub message_type: u32,
}

/// `hv_input_install_intercept`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct InstallIntercept {
    pub partition_id: u64,
    /// Bit 0 read, 1 write, 2 execute; 0 removes.
    pub access_mask: u32,
    pub intercept_type: u32,
    pub parameter: u64,
}

/// `hv_input_register_intercept_result` for CPUID, as far as clients send it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct RegisterInterceptResult {
    pub partition_id: u64,
    pub vp_index: u32,
    /// 2: CPUID. 1: MSR, where the rest means MSR number, access, action.
    pub intercept_type: u32,
    pub eax: u32,
    pub ecx: u32,
    pub subleaf_specific: u8,
    pub always_override: u8,
    pub padding: u16,
    /// EAX, EBX, ECX, EDX: value and mask each.
    pub result: [[u32; 2]; 4],
    /// Not in the header: the 60 bytes above rounded up.
    pub tail: u32,
}

/// `hv_input_translate_virtual_address`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct TranslateVirtualAddress {
    pub partition_id: u64,
    pub vp_index: u32,
    pub padding: u32,
    pub control_flags: u64,
    pub gva_page: u64,
}

/// `hv_output_translate_virtual_address`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct TranslateResult {
    pub result_code: u32,
    /// Cache type in bits 7:0, overlay page in bit 8.
    pub cache_type: u32,
    pub gpa_page: u64,
}

/// `hv_input_get_vp_cpuid_values`; one [`CpuidLeaf`] per rep follows, the output is 16 bytes per rep.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct GetVpCpuidValues {
    pub partition_id: u64,
    pub vp_index: u32,
    /// Bit 0: use XCR0 and XSS of the VP. Bit 1: apply registered results.
    pub flags: u32,
    pub reserved: [u32; 2],
}

/// `hv_cpuid_leaf_info`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct CpuidLeaf {
    pub eax: u32,
    pub ecx: u32,
    pub xfem: u64,
    pub xss: u64,
}

/// `HVMSG_*` that a VP may leave.
pub mod message {
    pub const NONE: u32 = 0;
    pub const UNMAPPED_GPA: u32 = 0x8000_0000;
    pub const GPA_INTERCEPT: u32 = 0x8000_0001;
    pub const INVALID_VP_REGISTER_VALUE: u32 = 0x8000_0020;
    pub const UNRECOVERABLE_EXCEPTION: u32 = 0x8000_0021;
    pub const SYNIC_SINT_DELIVERABLE: u32 = 0x8000_0062;
    pub const IO_PORT_INTERCEPT: u32 = 0x8001_0000;
    pub const MSR_INTERCEPT: u32 = 0x8001_0001;
    pub const CPUID_INTERCEPT: u32 = 0x8001_0002;
    pub const EXCEPTION_INTERCEPT: u32 = 0x8001_0003;
    pub const APIC_EOI: u32 = 0x8001_0004;
    /// Words of the longest message, header and payload: that about a port. The page of a VP's message has zeros behind them.
    pub const WORDS: usize = (16 + size_of::<super::IoPortIntercept>()) / 8;
}

/// `enum hv_intercept_access_type`.
pub mod access {
    pub const READ: u8 = 0;
    pub const WRITE: u8 = 1;
    pub const EXECUTE: u8 = 2;
}

/// `hv_message_header`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct MessageHeader {
    /// See [`message`].
    pub message_type: u32,
    pub payload_size: u8,
    pub message_flags: u8,
    pub reserved: [u8; 2],
    pub sender: u64,
}

/// `hv_x64_segment_register`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct SegmentRegister {
    pub base: u64,
    pub limit: u32,
    pub selector: u16,
    /// type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D 14, G 15.
    pub attributes: u16,
}

/// `hv_x64_intercept_message_header`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct InterceptHeader {
    pub vp_index: u32,
    /// Instruction length in bits 3:0, CR8 in bits 7:4.
    pub length_cr8: u8,
    /// See [`access`].
    pub access_type: u8,
    /// CPL 1:0, CR0.PE 2, CR0.AM 3, EFER.LMA 4, debug 5, interruption pending 6, shadow 12.
    pub execution_state: u16,
    pub cs: SegmentRegister,
    pub rip: u64,
    pub rflags: u64,
}

/// `hv_x64_memory_intercept_message`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct MemoryIntercept {
    pub header: InterceptHeader,
    pub cache_type: u32,
    pub instruction_byte_count: u8,
    /// Bit 0: GVA valid, bit 1: GVA to GPA valid.
    pub access_info: u8,
    pub tpr_priority: u8,
    pub reserved1: u8,
    pub gva: u64,
    pub gpa: u64,
    pub instruction_bytes: [u8; 16],
}

/// `hv_x64_io_port_intercept_message`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct IoPortIntercept {
    pub header: InterceptHeader,
    pub port: u16,
    /// Size 2:0, string 3, REP 4.
    pub access_info: u8,
    pub instruction_byte_count: u8,
    pub reserved: u32,
    pub rax: u64,
    pub instruction_bytes: [u8; 16],
    pub ds: SegmentRegister,
    pub es: SegmentRegister,
    pub rcx: u64,
    pub rsi: u64,
    pub rdi: u64,
}

/// `hv_x64_apic_eoi_message`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct ApicEoi {
    pub vp_index: u32,
    pub interrupt_vector: u32,
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<CreatePartition>() == 56);
    assert!(size_of::<WithdrawMemory>() == 16);
    assert!(size_of::<GetPartitionProperty>() == 16);
    assert!(size_of::<SetPartitionProperty>() == 24);
    assert!(size_of::<MapGpaPages>() == 24);
    assert!(size_of::<UnmapGpaPages>() == 24);
    assert!(size_of::<CreateVp>() == 40);
    assert!(size_of::<DeleteVp>() == 16);
    assert!(size_of::<VpRegisters>() == 16);
    assert!(size_of::<RegisterAssoc>() == 32);
    assert!(size_of::<MapVpStatePage>() == 24);
    assert!(offset_of!(MapVpStatePage, requested_map_location) == 16);
    assert!(size_of::<UnmapVpStatePage>() == 16);
    assert!(size_of::<VpState>() == 40);
    assert!(size_of::<AssertVirtualInterrupt>() == 32);
    assert!(size_of::<InstallIntercept>() == 24);
    assert!(offset_of!(RegisterInterceptResult, tail) == 60);
    assert!(size_of::<TranslateVirtualAddress>() == 32);
    assert!(size_of::<TranslateResult>() == 16);
    assert!(size_of::<GetVpCpuidValues>() == 24);
    assert!(size_of::<CpuidLeaf>() == 24);
    assert!(size_of::<MessageHeader>() == 16);
    assert!(size_of::<InterceptHeader>() == 40);
    assert!(size_of::<MemoryIntercept>() == 80);
    assert!(size_of::<IoPortIntercept>() == 128);
    assert!(size_of::<ApicEoi>() == 8);
};
