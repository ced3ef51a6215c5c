//! The rules nft cannot write, as bytes: each is the whole of a chain that the text of the skeleton leaves alone.
//!
//! `find`: one lookup after another, `KEY map @services`, then `vmap @nat_chains` with what was found. To nft 1.0.6, which
//! stops at a lookup of what another one found, it has to read as two statements: the number passes through the mark, whose
//! own value waits in a register meanwhile. So it lists these rules as
//! `meta mark set KEY map @services meta mark set meta mark meta mark vmap @nat_chains`; the mark stays what it was.
//!
//! `remember`: `update @affinity { ct original ip saddr . ct original ip daddr . meta l4proto . ct original proto-dst
//! timeout N : ip daddr . th dport }`, for which nft runs out of registers with IPv6 addresses.

use super::{
    element::{Chain, Family, Map},
    wire::{self, Transaction, nest, put, put_string},
};

const MSG_NEWRULE: u16 = 6;
const MSG_DELRULE: u16 = 8;
const NLM_F_APPEND: u16 = 0x800;
/// `NFT_REG32_00`: registers of four bytes from here on.
const KEY: u32 = 8;
const VALUE: u32 = KEY + 10;
const MARK: u32 = KEY + 15;
const VERDICT: u32 = 0;

mod number {
    pub(super) const CT_PROTO_DST: u32 = 12;
    pub(super) const CT_SRC: [u32; 2] = [19, 21];
    pub(super) const CT_DST: [u32; 2] = [20, 22];
    pub(super) const META_MARK: u32 = 3;
    pub(super) const META_L4PROTO: u32 = 16;
    pub(super) const BASE_NETWORK: u32 = 1;
    pub(super) const BASE_TRANSPORT: u32 = 2;
    pub(super) const DYNSET_UPDATE: u32 = 1;
}

/// Where a key is read from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    /// The packet.
    Packet,
    /// The first packet of its connection, before it was translated.
    Original,
}

/// A chain that looks a packet up in a map of numbers and goes to the chain with the number it finds.
struct Find {
    chain: &'static str,
    at: At,
    map: Map,
    chains: Map,
}

const fn find(chain: &'static str, at: At, map: Map, chains: Map) -> Find {
    Find { chain, at, map, chains }
}

const FINDS: [Find; 10] = [
    find("to_service", At::Packet, Map::Services, Map::NatChains),
    find("to_nodeport", At::Packet, Map::NodePorts, Map::NatChains),
    find("to_ext_cluster", At::Packet, Map::ExternalCluster, Map::PickChains),
    find("to_ext_local", At::Packet, Map::ExternalLocal, Map::PickChains),
    find("to_np_cluster", At::Packet, Map::NodePortCluster, Map::PickChains),
    find("to_np_local", At::Packet, Map::NodePortLocal, Map::PickChains),
    find("refuse_service", At::Packet, Map::Unavailable, Map::FilterChains),
    find("refuse_nodeport", At::Packet, Map::NodePortUnavailable, Map::FilterChains),
    find("remember_service", At::Original, Map::Affine, Map::FilterChains),
    find("remember_nodeport", At::Original, Map::NodePortAffine, Map::FilterChains),
];

/// The chains with rules from here that are always there.
pub(crate) fn finders() -> impl Iterator<Item = &'static str> {
    FINDS.iter().map(|f| f.chain)
}

/// Whether a chain's rules come from here.
pub(crate) fn owns(chain: &str) -> bool {
    finders().any(|f| f == chain) || matches!(chain.parse(), Ok(Chain::Remember(_)))
}

/// A transaction that puts the rules into the chains, those for `timeouts` among them, in place of what is there. Returns
/// its bytes and the number of its last message.
pub(crate) fn rules(table: &str, families: &[Family], timeouts: &[u32]) -> (Vec<u8>, u32) {
    let mut transaction = Transaction::begin();
    for family in families {
        for f in &FINDS {
            replace(&mut transaction, *family, (table, f.chain), |rule| write_find(rule, *family, f));
        }
        for seconds in timeouts {
            let chain = Chain::Remember(*seconds).to_string();
            replace(&mut transaction, *family, (table, &chain), |rule| write_remember(rule, *family, *seconds));
        }
    }
    transaction.end()
}

fn replace(
    transaction: &mut Transaction,
    family: Family,
    (table, chain): (&str, &str),
    write: impl FnOnce(&mut Vec<u8>),
) {
    let place = |m: &mut Vec<u8>| {
        put_string(m, 1, table);
        put_string(m, 2, chain);
    };
    transaction.add(MSG_DELRULE, 0, family, place);
    transaction.add(MSG_NEWRULE, wire::NLM_F_CREATE | NLM_F_APPEND, family, |m| {
        place(m);
        nest(m, 4, write);
    });
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

/// Loads a property of the packet.
fn load(out: &mut Vec<u8>, register: u32, what: u32) {
    expression(out, "meta", |e| {
        put_number(e, 1, register);
        put_number(e, 2, what);
    });
}

fn set_mark(out: &mut Vec<u8>, register: u32) {
    expression(out, "meta", |e| {
        put_number(e, 2, number::META_MARK);
        put_number(e, 3, register);
    });
}

fn lookup(out: &mut Vec<u8>, map: Map, result: u32) {
    expression(out, "lookup", |e| {
        put_string(e, 1, map.name());
        put_number(e, 2, KEY);
        put_number(e, 3, result);
    });
}

fn destination(out: &mut Vec<u8>, family: Family, register: u32) {
    let (offset, len) = if family == Family::V4 { (16, 4) } else { (24, 16) };
    payload(out, register, number::BASE_NETWORK, offset, len);
}

/// Registers an address takes.
fn width(family: Family) -> u32 {
    if family == Family::V4 { 1 } else { 4 }
}

fn write_find(rule: &mut Vec<u8>, family: Family, find: &Find) {
    let mut next = KEY;
    if super::skeleton::shape(find.map).starts_with('a') {
        match find.at {
            At::Packet => destination(rule, family, next),
            At::Original => original(rule, next, number::CT_DST[family.index()]),
        }
        next += width(family);
    }
    load(rule, next, number::META_L4PROTO);
    match find.at {
        At::Packet => payload(rule, next + 1, number::BASE_TRANSPORT, 2, 2),
        At::Original => original(rule, next + 1, number::CT_PROTO_DST),
    }
    lookup(rule, find.map, KEY);
    load(rule, MARK, number::META_MARK);
    set_mark(rule, KEY);
    load(rule, KEY, number::META_MARK);
    set_mark(rule, MARK);
    lookup(rule, find.chains, VERDICT);
}

fn write_remember(rule: &mut Vec<u8>, family: Family, seconds: u32) {
    let mut next = KEY;
    for what in [number::CT_SRC, number::CT_DST] {
        original(rule, next, what[family.index()]);
        next += width(family);
    }
    load(rule, next, number::META_L4PROTO);
    original(rule, next + 1, number::CT_PROTO_DST);
    // Destination address and port as translated.
    destination(rule, family, VALUE);
    payload(rule, VALUE + width(family), number::BASE_TRANSPORT, 2, 2);
    expression(rule, "dynset", |e| {
        put_string(e, 1, super::kernel::AFFINITY);
        put_number(e, 3, number::DYNSET_UPDATE);
        put_number(e, 4, KEY);
        put_number(e, 5, VALUE);
        put(e, 6, &(u64::from(seconds) * 1000).to_be_bytes());
    });
}
