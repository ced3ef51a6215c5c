//! From a query to its answer, or to the decision to ask upstream. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::{
    op::{Message, ResponseCode},
    serialize::binary::{BinEncodable, BinEncoder, NameEncoding},
};
use ipnet::IpNet;

use super::{
    BAD_VERSION, CLASS_IN, NO_ERROR, NO_SUCH_NAME, REFUSED, SERVER_FAILURE, kind,
    query::{LABELS_MAX, Query},
    reply::{Owner, Reply, Section, fail, put_name},
    zone::{Node, Record, Zone},
};

/// Seconds clients may remember our answers: short, services change.
const TTL: u32 = 5;

/// What to do with a query.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// The answer is written.
    Respond,
    /// Not ours: ask upstream.
    Forward,
    /// Ours, an alias to a name: the alias is written; ask for the name and append what is said.
    Follow(String),
}

/// Answers a query from the zone into `out`. `own_nets` are the addresses whose reverse names nobody else knows.
pub(crate) fn answer(zone: &Zone, own_nets: &[IpNet], query: &Query, limit: usize, out: &mut Vec<u8>) -> Verdict {
    let mut refuse = |code| {
        fail(query, code, out);
        Verdict::Respond
    };
    if query.edns.is_some_and(|e| e.version > 0) {
        return refuse(BAD_VERSION);
    }
    if query.class != CLASS_IN {
        return refuse(REFUSED);
    }
    let mut room = [""; LABELS_MAX];
    let Some(labels) = query.labels(&mut room) else { return Verdict::Forward };
    if let Some(own) = inside(labels, zone.domain()) {
        if !zone.is_ready() {
            return refuse(SERVER_FAILURE);
        }
        return from_zone(&Asked { zone, query, labels: own, limit }, out);
    }
    match labels {
        [.., "in-addr" | "ip6", "arpa"] => match reverse_address(labels) {
            Some(address) => reverse(zone, own_nets, query, address, limit, out),
            None => Verdict::Forward,
        },
        ["localhost"] => localhost(query, limit, out),
        _ => Verdict::Forward,
    }
}

/// The labels in front of the zone's, when the name is in it.
fn inside<'a>(labels: &'a [&'a str], domain: &str) -> Option<&'a [&'a str]> {
    let mut rest = labels;
    for label in domain.rsplit('.') {
        let (last, front) = rest.split_last()?;
        if *last != label {
            return None;
        }
        rest = front;
    }
    Some(rest)
}

fn wire_len(labels: &[&str]) -> usize {
    labels.iter().map(|l| l.len() + 1).sum()
}

/// A question about the zone.
struct Asked<'a> {
    zone: &'a Zone,
    query: &'a Query,
    /// In front of the zone's name.
    labels: &'a [&'a str],
    limit: usize,
}

impl Asked<'_> {
    /// The zone's own name, as a part of the one asked for.
    fn apex(&self) -> Owner<'static> {
        Owner::Suffix { label: None, skip: wire_len(self.labels) }
    }
}

fn put_soa(reply: &mut Reply<'_>, section: Section, owner: Owner<'_>, zone: &Zone) {
    let domain = || zone.domain().split('.');
    reply.add(section, owner, (kind::SOA, TTL), |out| {
        put_name(out, ["ns", "dns"].into_iter().chain(domain()));
        out.push(0);
        put_name(out, std::iter::once("hostmaster").chain(domain()));
        out.push(0);
        for number in [zone.serial(), 7200, 1800, 86_400, TTL] {
            out.extend_from_slice(&number.to_be_bytes());
        }
    });
}

fn type_of(record: &Record<'_>) -> u16 {
    match record {
        Record::Address(IpAddr::V4(_)) => kind::A,
        Record::Address(IpAddr::V6(_)) => kind::AAAA,
        Record::Service { .. } => kind::SRV,
        Record::Alias(_) => kind::CNAME,
        Record::Text(_) => kind::TXT,
    }
}

fn from_zone(asked: &Asked<'_>, out: &mut Vec<u8>) -> Verdict {
    let (query, zone) = (asked.query, asked.zone);
    let mut reply = Reply::new(query, asked.limit, out);
    let Some(node) = zone.find(asked.labels) else {
        put_soa(&mut reply, Section::Authority, asked.apex(), zone);
        reply.finish(NO_SUCH_NAME, true);
        return Verdict::Respond;
    };
    if asked.labels.is_empty() && matches!(query.kind, kind::SOA | kind::ANY) {
        put_soa(&mut reply, Section::Answer, Owner::Question, zone);
    }
    let fits = |r: &Record<'_>| {
        let own = type_of(r);
        own == query.kind || query.kind == kind::ANY || own == kind::CNAME
    };
    let (mut count, mut alias) = (0, None);
    node.records(&mut |r| {
        count += usize::from(fits(&r));
        if let Record::Alias(target) = r {
            alias = Some(target);
        }
    });
    // Clients that take the first address spread evenly: each answer begins with another record.
    let first = usize::from(query.id) % count.max(1);
    for part in [first..count, 0..first].into_iter().filter(|p| !p.is_empty()) {
        let mut number = 0;
        node.records(&mut |r| {
            if fits(&r) {
                if part.contains(&number) {
                    put_record(&mut reply, zone, &node, r);
                }
                number += 1;
            }
        });
    }
    if query.kind == kind::SRV && count > 0 {
        put_targets(&mut reply, &node);
    }
    if reply.count(Section::Answer) == 0 && count == 0 {
        put_soa(&mut reply, Section::Authority, asked.apex(), zone);
    }
    reply.finish(NO_ERROR, true);
    match alias.filter(|_| !matches!(query.kind, kind::CNAME | kind::ANY)) {
        Some(target) => Verdict::Follow(target.to_owned()),
        None => Verdict::Respond,
    }
}

fn put_record(reply: &mut Reply<'_>, zone: &Zone, node: &Node<'_, '_>, record: Record<'_>) {
    let head = (type_of(&record), TTL);
    match record {
        Record::Address(address) => reply.add_address(Section::Answer, Owner::Question, TTL, &address),
        Record::Service { port, host } => {
            let Node::Service(owner, _) = node else { return };
            reply.add(Section::Answer, Owner::Question, head, |out| {
                // Priority, weight, port; the name must not be compressed.
                [0, 100, port].iter().for_each(|n: &u16| out.extend_from_slice(&n.to_be_bytes()));
                let own = host.into_iter().chain([owner.name, owner.namespace, "svc"]);
                put_name(out, own.chain(zone.domain().split('.')));
                out.push(0);
            });
        }
        Record::Alias(target) => reply.add(Section::Answer, Owner::Question, head, |out| {
            put_name(out, target.split('.'));
            out.push(0);
        }),
        Record::Text(text) => reply.add(Section::Answer, Owner::Question, head, |out| {
            out.push(text.len() as u8);
            out.extend_from_slice(text.as_bytes());
        }),
    }
}

/// The addresses of the names that service records mention.
fn put_targets(reply: &mut Reply<'_>, node: &Node<'_, '_>) {
    let Node::Service(_, rest) = node else { return };
    node.targets(&mut |label, address| {
        let owner = Owner::Suffix { label, skip: wire_len(rest) };
        reply.add_address(Section::Additional, owner, TTL, &address);
    });
}

/// The address of a whole reverse name.
fn reverse_address(labels: &[&str]) -> Option<IpAddr> {
    match labels {
        [a, b, c, d, "in-addr", "arpa"] => {
            let mut octets = [0; 4];
            for (octet, label) in octets.iter_mut().zip([d, c, b, a]) {
                *octet = label.parse().ok()?;
            }
            Some(Ipv4Addr::from(octets).into())
        }
        [nibbles @ .., "ip6", "arpa"] if nibbles.len() == 32 => {
            let digit = |l: &&str| if l.len() == 1 { u128::from_str_radix(l, 16).ok() } else { None };
            let number = nibbles.iter().rev().try_fold(0, |n, l| Some(n << 4 | digit(l)?))?;
            Some(Ipv6Addr::from(number).into())
        }
        _ => None,
    }
}

fn reverse(
    zone: &Zone,
    own_nets: &[IpNet],
    query: &Query,
    address: IpAddr,
    limit: usize,
    out: &mut Vec<u8>,
) -> Verdict {
    let names = zone.names_of(&address);
    if names.is_empty() && !own_nets.iter().any(|n| n.contains(&address)) {
        return Verdict::Forward;
    }
    if !zone.is_ready() {
        fail(query, SERVER_FAILURE, out);
        return Verdict::Respond;
    }
    let mut reply = Reply::new(query, limit, out);
    if matches!(query.kind, kind::PTR | kind::ANY) {
        for name in &names {
            reply.add(Section::Answer, Owner::Question, (kind::PTR, TTL), |out| {
                put_name(out, name.split('.'));
                out.push(0);
            });
        }
    }
    if reply.count(Section::Answer) == 0 {
        put_soa(&mut reply, Section::Authority, Owner::Name(zone.domain()), zone);
    }
    reply.finish(if names.is_empty() { NO_SUCH_NAME } else { NO_ERROR }, true);
    Verdict::Respond
}

fn localhost(query: &Query, limit: usize, out: &mut Vec<u8>) -> Verdict {
    let mut reply = Reply::new(query, limit, out);
    let address = match query.kind {
        kind::A => Some(IpAddr::from([127, 0, 0, 1])),
        kind::AAAA => Some(IpAddr::from(Ipv6Addr::LOCALHOST)),
        _ => None,
    };
    address.iter().for_each(|a| reply.add_address(Section::Answer, Owner::Question, TTL, a));
    reply.finish(NO_ERROR, false);
    Verdict::Respond
}

/// The alias in front, and after it the answers of another message that was asked for its target.
pub(crate) fn follow(query: &Query, target: &str, said: &[u8], limit: usize, out: &mut Vec<u8>) {
    let Ok(said) = Message::from_vec(said) else { return };
    let mut reply = Reply::new(query, limit, out);
    reply.add(Section::Answer, Owner::Question, (kind::CNAME, TTL), |out| {
        put_name(out, target.split('.'));
        out.push(0);
    });
    for record in &said.answers {
        let name = record.name.to_ascii();
        let mut data = Vec::new();
        let mut encoder = BinEncoder::new(&mut data);
        encoder.set_name_encoding(NameEncoding::Uncompressed);
        if BinEncodable::emit(&record.data, &mut encoder).is_ok() {
            let head = (u16::from(record.record_type()), record.ttl);
            reply.add(Section::Answer, Owner::Name(&name), head, |out| out.extend_from_slice(&data));
        }
    }
    // An alias to nowhere exists itself: the code is that of the last name (RFC 6604).
    let code = if said.metadata.response_code == ResponseCode::NXDomain { NO_SUCH_NAME } else { NO_ERROR };
    reply.finish(code, false);
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::{RData, RecordType, rdata::A};

    use super::{
        super::{query::tests::ask, reply::udp_limit},
        *,
    };
    use crate::model::{
        objects::Kind,
        tests::{service, slice},
    };

    fn zone(endpoints: usize) -> Zone {
        let mut zone = Zone::new("cluster.local");
        let web = service("default", "web", &["10.96.0.9", "2001:db8:96::9"], &[("http", 80, 0)]);
        zone.update(&web.name.clone(), Some(&web), [].into_iter());
        let mut db = service("default", "db", &[], &[("sql", 1, 0)]);
        db.kind = Kind::Headless;
        let hosts: Vec<String> = (0..endpoints).map(|i| format!("10.244.{}.{}", i / 200, i % 200 + 1)).collect();
        let pairs: Vec<(&str, &str)> = hosts.iter().map(|h| (h.as_str(), "n1")).collect();
        let slice = slice(&db.name, "sql", 1, &pairs);
        zone.update(&db.name.clone(), Some(&db), [slice].iter());
        let mut out = service("default", "out", &[], &[]);
        out.kind = Kind::External("example.com".into());
        zone.update(&out.name.clone(), Some(&out), [].into_iter());
        zone.set_ready();
        zone
    }

    fn nets() -> Vec<IpNet> {
        vec!["10.96.0.0/16".parse().unwrap(), "2001:db8:96::/112".parse().unwrap()]
    }

    fn raw(zone: &Zone, name: &str, kind: RecordType, edns: Option<u16>, limit: usize) -> (Verdict, Vec<u8>) {
        let query = Query::parse(&ask(name, kind, edns)).unwrap();
        let mut out = Vec::new();
        let limit = if limit == 0 { udp_limit(&query) } else { limit };
        (answer(zone, &nets(), &query, limit, &mut out), out)
    }

    /// An answer as another implementation reads it.
    fn respond(zone: &Zone, name: &str, kind: RecordType) -> Message {
        let (verdict, bytes) = raw(zone, name, kind, None, 0);
        assert_eq!(verdict, Verdict::Respond, "{name}");
        Message::from_vec(&bytes).unwrap()
    }

    #[test]
    fn answers_are_authoritative_and_case_does_not_matter() {
        let response = respond(&zone(0), "WEB.default.svc.Cluster.local.", RecordType::A);
        assert!(response.metadata.authoritative && response.metadata.recursion_available);
        assert_eq!(response.answers.len(), 1);
        assert_eq!(response.answers[0].data, RData::A(A::new(10, 96, 0, 9)));
        assert_eq!(response.answers[0].name.to_ascii(), "WEB.default.svc.Cluster.local.");
        let six = respond(&zone(0), "web.default.svc.cluster.local.", RecordType::AAAA);
        assert_eq!(six.answers[0].data.to_string(), "2001:db8:96::9");
    }

    #[test]
    fn missing_names_and_types_carry_the_soa() {
        let zone = zone(0);
        let absent = respond(&zone, "nope.default.svc.cluster.local.", RecordType::A);
        assert_eq!(absent.metadata.response_code, ResponseCode::NXDomain);
        assert_eq!(absent.authorities[0].name.to_ascii(), "cluster.local.");
        let RData::SOA(soa) = &absent.authorities[0].data else { panic!() };
        assert_eq!((soa.minimum, soa.mname.to_ascii()), (TTL, "ns.dns.cluster.local.".into()));
        let no_data = respond(&zone, "web.default.svc.cluster.local.", RecordType::TXT);
        assert_eq!(no_data.metadata.response_code, ResponseCode::NoError);
        assert_eq!(no_data.authorities[0].record_type(), RecordType::SOA);
        let reverse = respond(&zone, "7.0.96.10.in-addr.arpa.", RecordType::PTR);
        assert_eq!(reverse.metadata.response_code, ResponseCode::NXDomain);
        assert_eq!(reverse.authorities[0].name.to_ascii(), "cluster.local.");
        assert_eq!(
            respond(&zone, "db.default.svc.cluster.local.", RecordType::A).metadata.response_code,
            ResponseCode::NXDomain
        );
        for name in ["7.0.0.192.in-addr.arpa.", "example.com.", "0.96.10.in-addr.arpa.", "local.", "."] {
            assert_eq!(raw(&zone, name, RecordType::PTR, None, 0).0, Verdict::Forward, "{name}");
        }
    }

    #[test]
    fn addresses_have_names_in_both_families() {
        let zone = zone(1);
        for (name, wanted) in [
            ("9.0.96.10.in-addr.arpa.".to_owned(), "web.default.svc.cluster.local."),
            ("1.0.244.10.in-addr.arpa.".to_owned(), "10-244-0-1.db.default.svc.cluster.local."),
            (format!("9.{}6.9.0.0.8.b.d.0.1.0.0.2.ip6.arpa.", "0.".repeat(19)), "web.default.svc.cluster.local."),
        ] {
            let response = respond(&zone, &name, RecordType::PTR);
            let data: Vec<String> = response.answers.iter().map(|r| r.data.to_string()).collect();
            assert_eq!(data, [wanted], "{name}");
        }
    }

    #[test]
    fn service_records_bring_addresses() {
        let response = respond(&zone(3), "_sql._tcp.db.default.svc.cluster.local.", RecordType::SRV);
        assert_eq!((response.answers.len(), response.additionals.len()), (3, 3));
        for extra in &response.additionals {
            let named = |r: &hickory_proto::rr::Record| matches!(&r.data, RData::SRV(s) if s.target == extra.name);
            assert!(response.answers.iter().any(named), "{extra}");
        }
        let own = respond(&zone(0), "_http._tcp.web.default.svc.cluster.local.", RecordType::SRV);
        let target = "web.default.svc.cluster.local.";
        assert!(matches!(&own.answers[0].data, RData::SRV(s) if s.port == 80 && s.target.to_ascii() == target));
        assert_eq!(own.additionals.len(), 2, "in both families");
        assert!(own.additionals.iter().all(|r| r.name.to_ascii() == target));
    }

    #[test]
    fn the_schema_has_a_version_and_aliases_are_followed() {
        let version = respond(&zone(0), "dns-version.cluster.local.", RecordType::TXT);
        assert_eq!(version.answers[0].data.to_string(), "1.1.0");
        let (verdict, bytes) = raw(&zone(0), "out.default.svc.cluster.local.", RecordType::A, None, 0);
        assert_eq!(verdict, Verdict::Follow("example.com".into()));
        let alias = Message::from_vec(&bytes).unwrap();
        assert_eq!(alias.answers[0].data.to_string(), "example.com.");
        assert_eq!(raw(&zone(0), "out.default.svc.cluster.local.", RecordType::CNAME, None, 0).0, Verdict::Respond);
        let query = Query::parse(&ask("out.default.svc.cluster.local.", RecordType::A, None)).unwrap();
        let mut said = Message::from_vec(&ask("example.com.", RecordType::A, None)).unwrap().into_response();
        let name = hickory_proto::rr::Name::from_ascii("example.com.").unwrap();
        said.answers.push(hickory_proto::rr::Record::from_rdata(name, 60, RData::A(A::new(192, 0, 2, 7))));
        let mut out = Vec::new();
        follow(&query, "example.com", &said.to_vec().unwrap(), 512, &mut out);
        let both = Message::from_vec(&out).unwrap();
        let lines: Vec<String> = both.answers.iter().map(ToString::to_string).collect();
        assert_eq!(lines, ["out.default.svc.cluster.local. 5 IN CNAME example.com.", "example.com. 60 IN A 192.0.2.7"]);
    }

    #[test]
    fn long_answers_are_cut_over_udp_only() {
        let zone = zone(300);
        let name = "db.default.svc.cluster.local.";
        for (edns, limit) in [(None, 512), (Some(4096), 1232), (Some(100), 512)] {
            let (_, bytes) = raw(&zone, name, RecordType::A, edns, 0);
            assert!(bytes.len() <= limit && bytes.len() > limit - 50, "{} of {limit}", bytes.len());
            let cut = Message::from_vec(&bytes).unwrap();
            assert!(cut.metadata.truncation && !cut.answers.is_empty());
            assert_eq!(cut.edns.map(|e| e.max_payload()), edns.map(|_| 1232));
        }
        let (_, bytes) = raw(&zone, name, RecordType::A, None, 65_535);
        let whole = Message::from_vec(&bytes).unwrap();
        assert_eq!((whole.metadata.truncation, whole.answers.len()), (false, 300));
    }

    #[test]
    fn answers_begin_with_another_record_each_time() {
        let zone = zone(3);
        let first = |id: u16| {
            let mut bytes = ask("db.default.svc.cluster.local.", RecordType::A, None);
            bytes[..2].copy_from_slice(&id.to_be_bytes());
            let mut out = Vec::new();
            answer(&zone, &[], &Query::parse(&bytes).unwrap(), 512, &mut out);
            let message = Message::from_vec(&out).unwrap();
            assert_eq!(message.answers.len(), 3);
            message.answers[0].data.to_string()
        };
        let firsts: std::collections::BTreeSet<String> = (0..3).map(first).collect();
        assert_eq!(firsts.len(), 3);
    }

    #[test]
    fn what_is_not_answered_says_why() {
        let zone = Zone::new("cluster.local");
        let before = respond(&zone, "web.default.svc.cluster.local.", RecordType::A);
        assert_eq!(before.metadata.response_code, ResponseCode::ServFail, "before the first list nothing is denied");
        let code = |change: &dyn Fn(&mut Query)| {
            let mut query = Query::parse(&ask("web.default.svc.cluster.local.", RecordType::A, Some(1232))).unwrap();
            change(&mut query);
            let mut out = Vec::new();
            assert_eq!(answer(&zone, &[], &query, 512, &mut out), Verdict::Respond);
            Message::from_vec(&out).unwrap().metadata.response_code
        };
        assert_eq!(code(&|q| q.class = 3), ResponseCode::Refused);
        let future = code(&|q| q.edns.as_mut().unwrap().version = 1);
        assert!(matches!(future, ResponseCode::BADVERS | ResponseCode::BADSIG), "{future:?}");
        let local = respond(&zone, "localhost.", RecordType::AAAA);
        assert_eq!(local.answers[0].data.to_string(), "::1");
    }
}
