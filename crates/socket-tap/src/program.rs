//! The program, as instructions (RFC 9669).

use std::os::fd::{AsRawFd as _, BorrowedFd};

/// What stands before a packet's bytes: its mark, and how long it was.
pub const HEAD: usize = 8;
/// Most that is passed on of a packet. (Segments are cut to the size of packets behind the place that this is at.)
pub const MOST: usize = 256 << 10;
/// Room is taken in one of these sizes, with the label of where that is done.
const SIZES: [(usize, &str); 3] = [(2 << 10, "small"), (64 << 10, "large"), (MOST, "huge")];

/// In `__sk_buff`.
const LENGTH: i16 = 0;
const SOCKET: i16 = 168;

// Helpers (linux/bpf.h).
const MAP_LOOKUP: i32 = 1;
const LOAD_BYTES: i32 = 26;
const FULL_SOCKET: i32 = 95;
const STORAGE_GET: i32 = 107;
const RING_RESERVE: i32 = 131;
const RING_SUBMIT: i32 = 132;
const RING_DISCARD: i32 = 133;

/// One instruction; `to`: a label to jump to.
struct Step {
    code: u8,
    registers: u8,
    offset: i16,
    value: i32,
    to: Option<&'static str>,
}

#[derive(Default)]
struct Program {
    steps: Vec<Step>,
    labels: Vec<(&'static str, usize)>,
}

impl Program {
    fn step(&mut self, code: u8, to: u8, from: u8, offset: i16, value: i32) {
        self.steps.push(Step { code, registers: from << 4 | to, offset, value, to: None });
    }

    fn jump(&mut self, code: u8, register: u8, value: i32, to: &'static str) {
        self.steps.push(Step { code, registers: register, offset: 0, value, to: Some(to) });
    }

    fn label(&mut self, name: &'static str) {
        self.labels.push((name, self.steps.len()));
    }

    fn set(&mut self, to: u8, value: i32) {
        self.step(0xb7, to, 0, 0, value);
    }

    fn copy(&mut self, to: u8, from: u8) {
        self.step(0xbf, to, from, 0, 0);
    }

    fn map(&mut self, to: u8, map: BorrowedFd<'_>) {
        self.step(0x18, to, 1, 0, map.as_raw_fd());
        self.step(0, 0, 0, 0, 0);
    }

    fn call(&mut self, helper: i32) {
        self.step(0x85, 0, 0, 0, helper);
    }

    fn if_equal(&mut self, register: u8, value: i32, to: &'static str) {
        self.jump(0x15, register, value, to);
    }

    fn go(&mut self, to: &'static str) {
        self.jump(0x05, 0, 0, to);
    }

    fn assemble(&self) -> Vec<u64> {
        let place =
            |name: &str| self.labels.iter().find(|(label, _)| *label == name).map_or(0, |(_, at)| *at);
        let encode = |(at, step): (usize, &Step)| {
            let offset = step.to.map_or(step.offset, |to| place(to).wrapping_sub(at + 1) as i16);
            u64::from(step.code)
                | u64::from(step.registers) << 8
                | u64::from(offset as u16) << 16
                | u64::from(step.value as u32) << 32
        };
        self.steps.iter().enumerate().map(encode).collect()
    }
}

/// Packets of sockets in `marks` go to `packets`; those that find no room are counted in `lost`. None is held up.
pub fn of(marks: BorrowedFd<'_>, packets: BorrowedFd<'_>, lost: BorrowedFd<'_>) -> Vec<u64> {
    let mut p = Program::default();
    // r6: the packet. r7: its mark. r8: its bytes to pass on. r9: the room for them.
    p.copy(6, 1);
    p.step(0x79, 1, 6, SOCKET, 0);
    p.if_equal(1, 0, "pass");
    p.call(FULL_SOCKET);
    p.if_equal(0, 0, "pass");
    p.copy(2, 0);
    p.map(1, marks);
    p.set(3, 0);
    p.set(4, 0);
    p.call(STORAGE_GET);
    p.if_equal(0, 0, "pass");
    p.step(0x61, 7, 0, 0, 0);
    p.step(0x61, 8, 6, LENGTH, 0);
    // Less than 1.
    p.jump(0xa5, 8, 1, "pass");
    // At most as much as may be.
    p.jump(0xb5, 8, MOST as i32, "measured");
    p.set(8, MOST as i32);
    p.label("measured");
    for (size, label) in SIZES {
        p.jump(0xb5, 8, size as i32, label);
    }
    p.go("pass");
    for (size, label) in SIZES {
        p.label(label);
        p.map(1, packets);
        p.set(2, (HEAD + size) as i32);
        p.set(3, 0);
        p.call(RING_RESERVE);
        p.if_equal(0, 0, "lost");
        p.go("fill");
    }
    p.label("fill");
    p.copy(9, 0);
    p.step(0x63, 9, 7, 0, 0);
    p.step(0x61, 1, 6, LENGTH, 0);
    p.step(0x63, 9, 1, 4, 0);
    p.copy(1, 6);
    p.set(2, 0);
    p.copy(3, 9);
    p.step(0x07, 3, 0, 0, HEAD as i32);
    p.copy(4, 8);
    p.call(LOAD_BYTES);
    p.copy(1, 9);
    p.set(2, 0);
    p.if_equal(0, 0, "submit");
    p.call(RING_DISCARD);
    p.go("pass");
    p.label("submit");
    p.call(RING_SUBMIT);
    p.go("pass");
    p.label("lost");
    p.step(0x62, 10, 0, -4, 0);
    p.copy(2, 10);
    p.step(0x07, 2, 0, 0, -4);
    p.map(1, lost);
    p.call(MAP_LOOKUP);
    p.if_equal(0, 0, "pass");
    p.set(1, 1);
    p.step(0xdb, 0, 1, 0, 0);
    p.label("pass");
    p.set(0, 1);
    p.step(0x95, 0, 0, 0, 0);
    p.assemble()
}
