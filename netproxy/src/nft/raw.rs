//! The rule that writes down an IPv6 client's endpoint, as bytes.
//!
//! nft 1.0.6 gives every part of such a statement registers of 16 bytes and runs out of them; the kernel has room for the
//! 40 bytes of key and 20 of value. So this one rule goes over netlink, into the chains that the skeleton leaves empty.
//! It reads: `update @affinity { ct original ip6 saddr . ct original ip6 daddr . meta l4proto . ct original proto-dst
//! timeout N : ip6 daddr . th dport }`.

use super::{
    element::{Chain, Family},
    wire::{self, nest, put, put_string},
};

const MSG_NEWRULE: u16 = 6;
const NLM_F_APPEND: u16 = 0x800;
/// `NFT_REG32_00`: registers of four bytes from here on.
const REGISTER: u32 = 8;
const KEY: u32 = REGISTER;
const VALUE: u32 = REGISTER + 10;

mod number {
    pub(super) const CT_PROTO_DST: u32 = 12;
    pub(super) const CT_SRC_IP6: u32 = 21;
    pub(super) const CT_DST_IP6: u32 = 22;
    pub(super) const META_L4PROTO: u32 = 16;
    pub(super) const BASE_NETWORK: u32 = 1;
    pub(super) const BASE_TRANSPORT: u32 = 2;
    pub(super) const DYNSET_UPDATE: u32 = 1;
}

fn put_number(out: &mut Vec<u8>, kind: u16, value: u32) {
    put(out, kind, &value.to_be_bytes());
}

fn expression(out: &mut Vec<u8>, name: &str, fill: impl FnOnce(&mut Vec<u8>)) {
    nest(out, 1, |e| {
        put_string(e, 1, name);
        nest(e, 2, fill);
    });
}

/// Loads a part of the original direction's tuple.
fn original(out: &mut Vec<u8>, register: u32, what: u32) {
    expression(out, "ct", |e| {
        put_number(e, 1, register);
        put_number(e, 2, what);
        put(e, 3, &[0]);
    });
}

fn payload(out: &mut Vec<u8>, register: u32, base: u32, offset: u32, len: u32) {
    expression(out, "payload", |e| {
        put_number(e, 1, register);
        put_number(e, 2, base);
        put_number(e, 3, offset);
        put_number(e, 4, len);
    });
}

/// A transaction that appends the rule to the chain for one timeout.
pub(crate) fn rule(table: &str, map: &str, seconds: u32) -> Vec<u8> {
    let flags = wire::NLM_F_CREATE | NLM_F_APPEND;
    wire::single_with(MSG_NEWRULE, flags, Family::V6, |m| {
        put_string(m, 1, table);
        put_string(m, 2, &Chain::Remember(seconds).to_string());
        nest(m, 4, |list| {
            original(list, KEY, number::CT_SRC_IP6);
            original(list, KEY + 4, number::CT_DST_IP6);
            expression(list, "meta", |e| {
                put_number(e, 1, KEY + 8);
                put_number(e, 2, number::META_L4PROTO);
            });
            original(list, KEY + 9, number::CT_PROTO_DST);
            // Destination address and port as translated.
            payload(list, VALUE, number::BASE_NETWORK, 24, 16);
            payload(list, VALUE + 4, number::BASE_TRANSPORT, 2, 2);
            expression(list, "dynset", |e| {
                put_string(e, 1, map);
                put_number(e, 3, number::DYNSET_UPDATE);
                put_number(e, 4, KEY);
                put_number(e, 5, VALUE);
                put(e, 6, &(u64::from(seconds) * 1000).to_be_bytes());
            });
        });
    })
}
