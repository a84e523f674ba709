//! Frames to the host, `depth` of them in flight, each `bytes` long.
//!
//! The frames are of an Ethernet type for experiments, which the host's kernel takes in and
//! drops: what is measured ends where every frame's way through a tap device does.

use core::hint::spin_loop;

use crate::{
    clock,
    order::Order,
    ring::{self, NEXT, Ring},
    virtio::Device,
};

const KIND: u32 = 1;
const QUEUE: u16 = 256;
const DEEPEST: u64 = 100;
const TRANSMIT: u32 = 1;
/// `virtio_net_hdr_v1`: nothing is asked for.
const HEADER: usize = 12;
const LONGEST: usize = 0x1_0000;
/// IEEE 802 local experimental Ethernet type 1.
const TYPE: [u8; 2] = [0x88, 0xb5];

#[repr(C, align(4096))]
struct Frame([u8; LONGEST]);

static mut RECEIVE: ring::Memory = ring::Memory::new();
static mut SEND: ring::Memory = ring::Memory::new();
static mut ZEROES: [u8; HEADER] = [0; HEADER];
static mut FRAME: Frame = Frame([0; LONGEST]);

/// Sends until the time is over.
pub fn run(order: &Order) {
    let depth = order.depth.clamp(1, DEEPEST) as u16;
    let device = Device::start(order.base, KIND, 0);
    // SAFETY: these are the only users of the two rings' memory.
    let (receive, mut send) =
        unsafe { (Ring::new(&raw mut RECEIVE, QUEUE), Ring::new(&raw mut SEND, QUEUE)) };
    // SAFETY: nobody else uses the frame yet; then the addresses alone are given on.
    let (header, frame) = unsafe {
        let frame = &raw mut FRAME.0;
        let bytes = &mut *frame;
        bytes[..6].fill(0xff);
        bytes[6] = 2;
        bytes[12..14].copy_from_slice(&TYPE);
        (&raw mut ZEROES as usize, frame as usize)
    };
    for slot in 0..depth {
        send.describe(2 * slot, header, HEADER as u32, NEXT);
        send.describe(2 * slot + 1, frame, order.bytes.clamp(60, LONGEST as u64) as u32, 0);
    }
    device.queue(0, &receive);
    device.queue(TRANSMIT, &send);
    device.go();
    (0..depth).for_each(|slot| send.add(2 * slot));
    let start = clock::cycles();
    loop {
        if send.publish() {
            device.kick(TRANSMIT);
        }
        if clock::is_over(start, order.cycles) {
            break;
        }
        let mut any = false;
        while let Some((head, _)) = send.take() {
            any = true;
            send.add(head);
        }
        if !any {
            spin_loop();
        }
    }
}
