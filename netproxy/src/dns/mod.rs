//! Cluster DNS: the zone of services and endpoints, the answers to queries, the sockets, and asking upstream.
//!
//! A query for the cluster or for a remembered name is answered by the thread that received it, from its bytes into the
//! bytes of the answer; what has to be asked upstream goes to the asynchronous part.

pub(crate) mod answer;
mod cache;
pub(crate) mod forward;
pub(crate) mod query;
pub(crate) mod reply;
pub(crate) mod server;
mod udp;
pub(crate) mod upstream;
pub(crate) mod zone;

const OPCODE_QUERY: u8 = 0;
const CLASS_IN: u16 = 1;

/// Types of records this server writes or looks at.
mod kind {
    pub(super) const A: u16 = 1;
    pub(super) const CNAME: u16 = 5;
    pub(super) const SOA: u16 = 6;
    pub(super) const PTR: u16 = 12;
    pub(super) const TXT: u16 = 16;
    pub(super) const AAAA: u16 = 28;
    pub(super) const SRV: u16 = 33;
    pub(super) const OPT: u16 = 41;
    pub(super) const ANY: u16 = 255;
}

// Response codes.
const NO_ERROR: u8 = 0;
const FORMAT_ERROR: u8 = 1;
const SERVER_FAILURE: u8 = 2;
const NO_SUCH_NAME: u8 = 3;
const NOT_IMPLEMENTED: u8 = 4;
const REFUSED: u8 = 5;
/// Upper bits of the extended code 16: this version of EDNS is not known.
const BAD_VERSION: u8 = 16;
