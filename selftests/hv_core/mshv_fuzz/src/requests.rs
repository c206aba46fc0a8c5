// SPDX-License-Identifier: GPL-2.0
//! Arguments of the ioctls of `/dev/mshv`: right ones, of which the caller makes wrong ones.

use crate::arena;
use crate::guest;
use crate::random::Random;

/// Bytes of a structure, field after field.
#[derive(Default)]
pub struct Bytes(pub Vec<u8>);

impl Bytes {
    fn u8(mut self, value: u64) -> Self {
        self.0.push(value as u8);
        self
    }

    fn u16(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&(value as u16).to_le_bytes());
        self
    }

    fn u32(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&(value as u32).to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn zeros(mut self, count: usize) -> Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// Something in it becomes another thing.
    pub fn damage(&mut self, random: &mut Random) {
        let length = self.0.len() as u64;
        if length == 0 {
            return;
        }
        for _ in 0..=random.below(2) {
            let width = 1 << random.below(4);
            let at = (random.below(length) & !(width - 1)) as usize;
            let value = random.value().to_le_bytes();
            match random.below(3) {
                0 => self.0[at] ^= 1 << random.below(8),
                _ => {
                    for (byte, new) in self.0[at..].iter_mut().zip(&value[..width as usize]) {
                        *byte = *new;
                    }
                }
            }
        }
    }
}

/// What has a number of its own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// What it is called.
    pub name: &'static str,
    /// Number of the ioctl.
    pub command: u32,
    /// On what it works.
    pub on: On,
    /// How often it comes, compared with others.
    pub weight: u64,
}

/// Kinds of files.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// `/dev/mshv`.
    Device,
    /// A partition.
    Partition,
    /// A VP.
    Vp,
    /// What `CREATE_DEVICE` gives.
    Object,
    /// Device, partition or VP.
    Any,
}

const fn kind(name: &'static str, command: u32, on: On, weight: u64) -> Kind {
    Kind {
        name,
        command,
        on,
        weight,
    }
}

/// All ioctls.
pub const KINDS: [Kind; 16] = [
    kind("CREATE_PARTITION", 0x4010_b800, On::Device, 3),
    kind("INITIALIZE_PARTITION", 0xb800, On::Partition, 4),
    kind("CREATE_VP", 0x4004_b801, On::Partition, 6),
    kind("SET_GUEST_MEMORY", 0x4020_b802, On::Partition, 14),
    kind("IRQFD", 0x4010_b803, On::Partition, 7),
    kind("IOEVENTFD", 0x4020_b804, On::Partition, 7),
    kind("SET_MSI_ROUTING", 0x4008_b805, On::Partition, 4),
    kind("GET_GPAP_ACCESS_BITMAP", 0xc020_b806, On::Partition, 4),
    kind("ROOT_HVCALL", 0xc020_b807, On::Any, 40),
    kind("CREATE_DEVICE", 0xc00c_b808, On::Partition, 2),
    kind("PORT_EVENTFD", 0x4010_b8c0, On::Partition, 5),
    kind("SET_DEVICE_ATTR", 0x4018_b800, On::Object, 1),
    kind("HAS_DEVICE_ATTR", 0x4018_b802, On::Object, 1),
    kind("RUN_VP", 0x8100_b800, On::Vp, 12),
    kind("GET_VP_STATE", 0xc010_b801, On::Vp, 6),
    kind("SET_VP_STATE", 0xc010_b802, On::Vp, 6),
];

/// The argument of an ioctl; `events` are descriptors, `own` the thread.
pub fn argument(kind: Kind, random: &mut Random, own: u64, events: [i32; 2]) -> Bytes {
    let new = Bytes::default();
    let [event, other] = events.map(|fd| fd as u64);
    match kind.name {
        "CREATE_PARTITION" if random.once_in(2) => {
            // Without features two of them.
            let hide = |random: &mut Random| random.value() & random.next();
            new.u64(random.below(64) | 8)
                .u64(0)
                .u16(2)
                .zeros(6)
                .u64(hide(random))
                .u64(hide(random))
                .zeros(16)
                .u64(hide(random))
        }
        "CREATE_PARTITION" => new.u64(random.below(64) & !8).u64(0),
        "INITIALIZE_PARTITION" => new,
        "CREATE_VP" => {
            let few = random.below(3);
            let many = random.below(257);
            new.u32(if random.once_in(8) { many } else { few })
        }
        "SET_GUEST_MEMORY" => memory(random),
        "IRQFD" => new
            .u32(event)
            .u32(other)
            .u32(random.below(8))
            .u32(random.below(4)),
        "IOEVENTFD" => {
            let port = random.once_in(2);
            let address = if port {
                random.of(&[0x10, 0x80, 0x33, 0x1000])
            } else {
                random.below(0x900) << 12 | random.below(8)
            };
            new.u64(random.below(4) * 0x11)
                .u64(address)
                .u32(random.of(&[0, 1, 2, 4, 8]))
                .u32(event)
                .u32(random.below(2) | u64::from(port) << 1 | u64::from(random.once_in(4)) << 2)
                .zeros(4)
        }
        "PORT_EVENTFD" => new
            .u32(random.of(&[0, 1, 2, 3, 0xff_ffff, 0x100_0000]))
            .u32(event)
            .u32(u64::from(random.once_in(3)))
            .zeros(4),
        "SET_MSI_ROUTING" => {
            let count = random.below(9);
            (0..count).fold(new.u32(count).u32(0), |table, gsi| {
                table
                    .u32(gsi)
                    .u32(0xfee0_0000 | random.below(4) << 12 | random.below(2) << 2)
                    .u32(0)
                    .u32(random.below(0x10000))
            })
        }
        "GET_GPAP_ACCESS_BITMAP" => new
            .u8(random.below(2))
            .u8(random.below(3))
            .zeros(6)
            .u64(random.below(0x8000) + 1)
            .u64(random.below(0x1000))
            .u64(arena::place(random, own, 4096)),
        "ROOT_HVCALL" => hypercall(random, own),
        "CREATE_DEVICE" => new.u32(0).u32(0).u32(random.below(2)),
        "SET_DEVICE_ATTR" | "HAS_DEVICE_ATTR" => new
            .u32(0)
            .u32(1)
            .u64(random.below(2) + 1)
            .u64(arena::place(random, own, 8)),
        "GET_VP_STATE" | "SET_VP_STATE" => {
            let buffer = arena::place(random, own, 4096);
            let state = random.below(5);
            if kind.name == "SET_VP_STATE" && random.once_in(2) {
                arena::write(buffer, &vp_state(random, state));
            }
            new.u8(state).zeros(3).u32(4096).u64(buffer)
        }
        // RUN_VP: a message.
        _ => new.zeros(256),
    }
}

fn memory(random: &mut Random) -> Bytes {
    let (ram, size) = arena::ram();
    // Mostly in a grid, so that regions meet the same region again.
    let (first, pages) = if random.once_in(3) {
        (random.below(0x800), 1 + random.below(0x400))
    } else {
        (random.below(16) * 0x80, random.of(&[0x40, 0x80, 0x100]))
    };
    let offset = (first << 12) % size;
    let address = match random.below(12) {
        0 => arena::window(random),
        1 => ram + (random.below(0x800) << 12),
        _ => ram + offset,
    };
    let flags = random.of(&[0, 1, 2, 3, 3, 3, 3, 4, 4, 4]);
    Bytes::default()
        .u64(pages << 12)
        .u64(first)
        .u64(address)
        .u8(flags)
        .zeros(7)
}

/// A state that is right up to a few fields.
fn vp_state(random: &mut Random, state: u64) -> Vec<u8> {
    let mut bytes = Bytes(vec![0; 4096]);
    match state {
        0 => {
            for register in 0..64 {
                if random.once_in(3) {
                    let value = random.value() as u32;
                    bytes.0[register * 16..][..4].copy_from_slice(&value.to_le_bytes());
                }
            }
            // Version and SPIV as they are most.
            bytes.0[0x30..0x34].copy_from_slice(&[0x14, 0, 5, 0]);
            bytes.0[0xf1] = 1;
        }
        1 => {
            bytes.0[..2].copy_from_slice(&[0x7f, 0x03]);
            bytes.0[24..26].copy_from_slice(&[0x80, 0x1f]);
            bytes.0[512] = random.below(8) as u8;
            bytes.0[520] = random.below(8) as u8;
            bytes.0[527] = 0x80;
        }
        _ => {}
    }
    if random.once_in(2) {
        bytes.damage(random);
    }
    bytes.0
}

/// Names of registers: first and number.
const REGISTERS: [(u64, u64); 19] = [
    (0x0, 6),
    (0x210, 6),
    (0x240, 2),
    (0x1_0002, 6),
    (0x2_0000, 18),
    (0x3_0000, 26),
    (0x4_0000, 6),
    (0x4_1000, 5),
    (0x5_0000, 6),
    (0x6_0000, 8),
    (0x7_0000, 2),
    (0x8_0000, 17),
    (0x8_0040, 4),
    (0x8_0070, 0x38),
    (0x8_4802, 2),
    (0x9_0000, 0x18),
    (0xa_0000, 0x16),
    (0xb_0000, 8),
    (0x8_1000, 0x20),
];

fn register_name(random: &mut Random) -> u64 {
    let (first, count) = random.of(&REGISTERS);
    first + random.below(count)
}

fn register_value(random: &mut Random, name: u64) -> [u64; 2] {
    let any = random.value();
    let good = match name {
        0x0..=0x5 => random.below(4),
        0x1_0002 => random.below(8) << 1 | random.below(256) << 16 | random.below(2),
        0x2_0010 => guest::START + random.below(0x800),
        0x2_0011 => 2 | random.next() & 0x3f_7fd5,
        0x4_0000 => random.of(&[0x10, 0x11, 0x6000_0010, 0x8000_0011, 0x8005_0033]),
        0x4_0002 => random.below(16) << 12,
        0x4_0003 => random.of(&[0, 0x20, 0x620, 0x30, 0x7_06a0, 0x30_0ea0]),
        0x8_0001 => random.of(&[0, 0x100, 0x500, 0xd01, 0x901]),
        0x8_0003 => 0xfee0_0000 | random.below(16) << 8,
        0x6_0000..=0x6_0007 => {
            let attributes = random.of(&[0x9b, 0x93, 0xa09b, 0xc09b, 0xc093, 0x8b, 0x82, 0x1_0000]);
            let base = if random.once_in(3) { any } else { 0 };
            let low = random.of(&[0xffff, 0xffff_ffff, 0, any]) & 0xffff_ffff;
            return [base, low | (any & 0xfff8) << 32 | attributes << 48];
        }
        0x9_0001 | 0x9_0013 | 0x9_0017 => random.below(0x900) << 12 | 1,
        _ => any,
    };
    [if random.once_in(6) { any } else { good }, 0]
}

/// The registers of a VP that starts at `guest::START` in real or 64-bit mode, as input of the hypercall.
pub fn start(index: u32, long: bool) -> (Bytes, u64) {
    let segment = |attributes: u64| [0, 0xffff | attributes << 48];
    let mut list = vec![
        (0u64, [0, 0]),
        (0x2_0010, [guest::START, 0]),
        (0x2_0011, [2, 0]),
        (0x2_0004, [0x7000, 0]),
        (0x6_0001, segment(if long { 0xa09b } else { 0x9b })),
        (0x6_0002, segment(0x93)),
        (0x6_0003, segment(0x93)),
    ];
    if long {
        list.extend([
            (0x4_0003, [0x20, 0]),
            (0x4_0002, [0x1000, 0]),
            (0x8_0001, [0x500, 0]),
            (0x4_0000, [0x8000_0011, 0]),
        ]);
    }
    let head = Bytes::default().u64(0).u32(index.into()).u32(0);
    let count = list.len() as u64;
    let whole = list.into_iter().fold(head, |bytes, (name, [low, high])| {
        bytes.u32(name).zeros(12).u64(low).u64(high)
    });
    (whole, count)
}

/// The envelope of a hypercall.
pub fn envelope(code: u64, reps: u64, input: (u64, u64), output: (u64, u64)) -> Bytes {
    Bytes::default()
        .u16(code)
        .u16(reps)
        .u16(input.1)
        .u16(output.1)
        .zeros(8)
        .u64(input.0)
        .u64(output.0)
}

fn hypercall(random: &mut Random, own: u64) -> Bytes {
    let head = Bytes::default();
    let vp = if random.once_in(16) {
        random.value()
    } else {
        random.below(3)
    };
    let property = random.of(&[
        0x1_0000, 0x1_0001, 0x3_0003, 0x3_0005, 0x5_0003, 0x5_0005, 0x5_0017, 0x6_0000, 0x6_0002,
        0x6_0006, 0x6_0007, 0x6_0008, 0x6_0009, 0x6_000a, 0x6_000b, 0x9_0007, 0x9_0009, 0x5_0000,
    ]);
    let about = |property| Bytes::default().u64(0).u32(property).u32(0);
    let many = random.of(&[1, 1, 1, 1, 2, 5, 20, 56, 127, 150]);
    let gva = [4, random.below(0x900), random.value() >> 12][random.below(3) as usize];
    let (code, reps, mut input, output) = match random.below(16) {
        0 => (0x44, 0, about(property), 8),
        1 => (0x45, 0, about(property).u64(random.value()), 0),
        2 => (0x101, 0, about(property).u64(0), 4072),
        3 => (
            0x4d,
            0,
            head.u64(0)
                .u32(random.below(8))
                .u32(random.below(13))
                .u64(random.below(0x200)),
            0,
        ),
        4..7 => {
            let head = head.u64(0).u32(vp).u32(0);
            let names = (0..many).fold(head, |input, _| input.u32(register_name(random)));
            (0x50, many, names, 4096.min(16 * many))
        }
        7..11 => {
            let many = many.min(127);
            let head = head.u64(0).u32(vp).u32(0);
            let values = (0..many).fold(head, |input, _| {
                let name = register_name(random);
                let [low, high] = register_value(random, name);
                input.u32(name).zeros(12).u64(low).u64(high)
            });
            (0x51, many, values, 0)
        }
        11 => (
            0x52,
            0,
            head.u64(0).u32(vp).u32(0).u64(random.below(0x800)).u64(gva),
            16,
        ),
        12 => {
            let leaf =
                random.of(&[0, 1, 2, 4, 7, 0xb, 0xd, 0x4000_0000, 0x8000_0000]) + random.below(16);
            let head = head.u64(0).u32(vp).u32(2).u32(leaf).u32(random.below(8));
            let result = (0..8).fold(
                head.u8(random.below(2)).u8(random.below(2)).u16(0),
                |input, _| input.u32(random.value()),
            );
            (0x91, 0, result, 0)
        }
        13 | 14 => (
            0x94,
            0,
            head.u64(0)
                .u32(random.below(10))
                .u32(random.below(4))
                .u64(random.below(4))
                .u32(random.below(256))
                .u32(0),
            0,
        ),
        _ => {
            let head = head.u64(0).u32(vp).u32(random.below(4)).zeros(8);
            let leaves = (0..many).fold(head, |input, _| {
                let leaf = random.of(&[0, 0x4000_0000, 0x8000_0000]) + random.below(0x20);
                input.u32(leaf).u32(random.below(64)).u64(7).u64(0)
            });
            (0xf4, many, leaves, 4096.min(16 * many))
        }
    };
    if random.once_in(8) {
        input.damage(random);
    }
    let length = input.0.len() as u64;
    let from = arena::place(random, own, length);
    arena::write(from, &input.0[..length.min(4096) as usize]);
    let to = if output == 0 {
        0
    } else {
        arena::place(random, own, output)
    };
    let code = if random.once_in(24) {
        random.of(&[0x40, 0x48, 0x4b, 0x4e, 0x56, 0x99, 0xc0, 0xc1, 0xc9, 0xf001])
    } else {
        code
    };
    envelope(code, reps, (from, length), (to, output))
}
