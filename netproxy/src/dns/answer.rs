//! From a query's bytes to a response's bytes, or to the decision to ask upstream. Pure.

use std::net::IpAddr;

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, CNAME, PTR, SOA, SRV, TXT},
    },
};
use ipnet::IpNet;

use super::zone::{Data, Lookup, Zone};

/// Seconds clients may remember our answers: short, services change.
const TTL: u32 = 5;
/// Payload we send over UDP at most: passes every sane path unfragmented.
const UDP_MAX: usize = 1232;
const UDP_MIN: usize = 512;

/// What to do with a query.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Send this.
    Respond(Message),
    /// Not ours: ask upstream.
    Forward,
    /// Ours, an alias to a name that is not: ask upstream for the name and append what it says.
    Follow(Message, Name),
}

/// A response with the query's identity, flags, question and EDNS.
pub(crate) fn response_to(query: &Message, code: ResponseCode) -> Message {
    let mut response = Message::new(query.metadata.id, MessageType::Response, query.metadata.op_code);
    response.metadata.recursion_desired = query.metadata.recursion_desired;
    response.metadata.checking_disabled = query.metadata.checking_disabled;
    response.metadata.recursion_available = true;
    response.metadata.response_code = code;
    response.queries.clone_from(&query.queries);
    if let Some(edns) = &query.edns {
        let mut own = Edns::new();
        own.set_max_payload(u16::try_from(UDP_MAX).unwrap_or(u16::MAX));
        own.set_dnssec_ok(edns.flags().dnssec_ok);
        response.edns = Some(own);
    }
    response
}

/// Answers a query from the zone. `own_nets` are the addresses whose reverse names nobody else knows.
pub(crate) fn answer(zone: &Zone, own_nets: &[IpNet], query: &Message) -> Verdict {
    let fail = |code| Verdict::Respond(response_to(query, code));
    if query.metadata.op_code != OpCode::Query || query.metadata.message_type != MessageType::Query {
        return fail(ResponseCode::NotImp);
    }
    if query.edns.as_ref().is_some_and(|e| e.version() > 0) {
        return fail(ResponseCode::BADVERS);
    }
    let [question] = query.queries.as_slice() else { return fail(ResponseCode::FormErr) };
    if question.query_class() != DNSClass::IN {
        return fail(ResponseCode::Refused);
    }
    let labels: Option<Vec<String>> =
        question.name().iter().map(|l| std::str::from_utf8(l).ok().map(str::to_ascii_lowercase)).collect();
    let Some(labels) = labels else { return Verdict::Forward };
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    if let Some(own) = inside(&labels, zone.domain()) {
        if !zone.is_ready() {
            return fail(ResponseCode::ServFail);
        }
        return from_zone(zone, query, question, own);
    }
    if matches!(labels.as_slice(), [.., "in-addr" | "ip6", "arpa"]) {
        return reverse(zone, own_nets, query, question);
    }
    if labels == ["localhost"] {
        return Verdict::Respond(localhost(query, question));
    }
    Verdict::Forward
}

/// The labels in front of the zone's, when the name is in it.
fn inside<'a, 'b>(labels: &'a [&'b str], domain: &str) -> Option<&'a [&'b str]> {
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

fn name(text: &str) -> Name {
    let mut name = Name::from_ascii(text).unwrap_or_else(|_| Name::root());
    name.set_fqdn(true);
    name
}

fn rdata(data: &Data) -> RData {
    match data {
        Data::Address(IpAddr::V4(a)) => RData::A(A(*a)),
        Data::Address(IpAddr::V6(a)) => RData::AAAA(AAAA(*a)),
        Data::Service { port, target } => RData::SRV(SRV::new(0, 100, *port, name(target))),
        Data::Alias(target) => RData::CNAME(CNAME(name(target))),
        Data::Pointer(target) => RData::PTR(PTR(name(target))),
        Data::Text(text) => RData::TXT(TXT::new(vec![(*text).to_owned()])),
    }
}

fn soa(zone: &Zone) -> Record {
    let domain = zone.domain();
    let data = SOA::new(
        name(&format!("ns.dns.{domain}")),
        name(&format!("hostmaster.{domain}")),
        zone.serial(),
        7200,
        1800,
        86_400,
        TTL,
    );
    Record::from_rdata(name(domain), TTL, RData::SOA(data))
}

fn from_zone(zone: &Zone, query: &Message, question: &Query, labels: &[&str]) -> Verdict {
    let mut response = response_to(query, ResponseCode::NoError);
    response.metadata.authoritative = true;
    let kind = question.query_type();
    let (records, extra) = match zone.lookup(labels) {
        Lookup::Found { records, extra } => (records, extra),
        Lookup::Absent => {
            response.metadata.response_code = ResponseCode::NXDomain;
            response.authorities.push(soa(zone));
            return Verdict::Respond(response);
        }
    };
    if labels.is_empty() && matches!(kind, RecordType::SOA | RecordType::ANY) {
        response.answers.push(soa(zone));
    }
    let mut alias = None;
    for record in &records {
        let data = rdata(record);
        if data.record_type() == kind || kind == RecordType::ANY {
            response.answers.push(Record::from_rdata(question.name().clone(), TTL, data));
        } else if let RData::CNAME(target) = &data {
            alias = Some(target.0.clone());
            response.answers.push(Record::from_rdata(question.name().clone(), TTL, data));
        }
    }
    // Clients that take the first address spread evenly.
    let count = response.answers.len();
    if count > 1 {
        response.answers.rotate_left(usize::from(query.metadata.id) % count);
    }
    if kind == RecordType::SRV && count > 0 {
        let addresses = extra.iter().map(|(n, a)| Record::from_rdata(name(n), TTL, rdata(&Data::Address(*a))));
        response.additionals.extend(addresses);
    }
    if count == 0 {
        response.authorities.push(soa(zone));
    }
    match alias {
        Some(target) => Verdict::Follow(response, target),
        None => Verdict::Respond(response),
    }
}

fn reverse(zone: &Zone, own_nets: &[IpNet], query: &Message, question: &Query) -> Verdict {
    let Ok(net) = question.name().parse_arpa_name() else { return Verdict::Forward };
    if net.prefix_len() != net.max_prefix_len() {
        return Verdict::Forward;
    }
    let address = net.addr();
    let names = zone.names_of(&address);
    if names.is_empty() && !own_nets.iter().any(|n| n.contains(&address)) {
        return Verdict::Forward;
    }
    if !zone.is_ready() {
        return Verdict::Respond(response_to(query, ResponseCode::ServFail));
    }
    let mut response = response_to(query, ResponseCode::NoError);
    response.metadata.authoritative = true;
    if names.is_empty() {
        response.metadata.response_code = ResponseCode::NXDomain;
    } else if matches!(question.query_type(), RecordType::PTR | RecordType::ANY) {
        let pointers = names.into_iter().map(|n| rdata(&Data::Pointer(n)));
        response.answers.extend(pointers.map(|d| Record::from_rdata(question.name().clone(), TTL, d)));
    }
    if response.answers.is_empty() {
        response.authorities.push(soa(zone));
    }
    Verdict::Respond(response)
}

fn localhost(query: &Message, question: &Query) -> Message {
    let mut response = response_to(query, ResponseCode::NoError);
    let address = match question.query_type() {
        RecordType::A => Some(IpAddr::from([127, 0, 0, 1])),
        RecordType::AAAA => Some(IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])),
        _ => None,
    };
    let records = address.map(|a| Record::from_rdata(question.name().clone(), TTL, rdata(&Data::Address(a))));
    response.answers.extend(records);
    response
}

/// How long an answer over UDP to this query may be.
pub(crate) fn udp_limit(query: &Message) -> usize {
    query.edns.as_ref().map_or(UDP_MIN, |e| usize::from(e.max_payload()).clamp(UDP_MIN, UDP_MAX))
}

/// Writes a response, leaving out what does not fit: additional records first; cut answers set the TC bit.
pub(crate) fn encode(mut response: Message, limit: usize) -> Option<Vec<u8>> {
    let mut bytes = response.to_vec().ok()?;
    if bytes.len() <= limit {
        return Some(bytes);
    }
    response.additionals.clear();
    bytes = response.to_vec().ok()?;
    while bytes.len() > limit && !(response.answers.is_empty() && response.authorities.is_empty()) {
        response.metadata.truncation = true;
        response.authorities.clear();
        let keep = response.answers.len() * limit / bytes.len();
        response.answers.truncate(keep.min(response.answers.len().saturating_sub(1)));
        bytes = response.to_vec().ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::{service, slice};

    fn ask(text: &str, kind: RecordType) -> Message {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(text).unwrap(), kind));
        message
    }

    fn zone(endpoints: usize) -> Zone {
        let mut zone = Zone::new("cluster.local");
        let web = service("default", "web", &["10.96.0.9"], &[("http", 80, 0)]);
        zone.update(&web.name.clone(), Some(&web), [].into_iter());
        let mut db = service("default", "db", &[], &[("sql", 1, 0)]);
        db.kind = crate::model::objects::Kind::Headless;
        let hosts: Vec<String> = (0..endpoints).map(|i| format!("10.244.{}.{}", i / 200, i % 200 + 1)).collect();
        let pairs: Vec<(&str, &str)> = hosts.iter().map(|h| (h.as_str(), "n1")).collect();
        let slice = slice(&db.name, "sql", 1, &pairs);
        zone.update(&db.name.clone(), Some(&db), [slice].iter());
        zone.set_ready();
        zone
    }

    fn respond(zone: &Zone, text: &str, kind: RecordType) -> Message {
        match answer(zone, &["10.96.0.0/16".parse().unwrap()], &ask(text, kind)) {
            Verdict::Respond(message) => message,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn answers_are_authoritative_and_case_does_not_matter() {
        let response = respond(&zone(0), "WEB.default.svc.Cluster.local.", RecordType::A);
        assert!(response.metadata.authoritative);
        assert_eq!(response.answers.len(), 1);
        assert_eq!(response.answers[0].data, RData::A(A::new(10, 96, 0, 9)));
        assert_eq!(response.answers[0].name.to_ascii(), "WEB.default.svc.Cluster.local.");
    }

    #[test]
    fn missing_names_and_types_carry_the_soa() {
        let zone = zone(0);
        let absent = respond(&zone, "nope.default.svc.cluster.local.", RecordType::A);
        assert_eq!(absent.metadata.response_code, ResponseCode::NXDomain);
        assert_eq!(absent.authorities[0].record_type(), RecordType::SOA);
        let no_data = respond(&zone, "web.default.svc.cluster.local.", RecordType::AAAA);
        assert_eq!(no_data.metadata.response_code, ResponseCode::NoError);
        assert_eq!(no_data.authorities[0].record_type(), RecordType::SOA);
        let reverse = respond(&zone, "7.0.96.10.in-addr.arpa.", RecordType::PTR);
        assert_eq!(reverse.metadata.response_code, ResponseCode::NXDomain);
        let known = respond(&zone, "9.0.96.10.in-addr.arpa.", RecordType::PTR);
        assert_eq!(known.answers.len(), 1);
        assert!(matches!(answer(&zone, &[], &ask("7.0.0.192.in-addr.arpa.", RecordType::PTR)), Verdict::Forward));
        assert!(matches!(answer(&zone, &[], &ask("example.com.", RecordType::A)), Verdict::Forward));
    }

    #[test]
    fn service_records_bring_addresses() {
        let response = respond(&zone(3), "_sql._tcp.db.default.svc.cluster.local.", RecordType::SRV);
        assert_eq!((response.answers.len(), response.additionals.len()), (3, 3));
    }

    #[test]
    fn long_answers_are_cut_over_udp_only() {
        let zone = zone(300);
        let query = ask("db.default.svc.cluster.local.", RecordType::A);
        let Verdict::Respond(full) = answer(&zone, &[], &query) else { panic!() };
        assert_eq!(full.answers.len(), 300);
        let bytes = encode(full.clone(), udp_limit(&query)).unwrap();
        assert!(bytes.len() <= 512);
        let cut = Message::from_vec(&bytes).unwrap();
        assert!(cut.metadata.truncation && !cut.answers.is_empty());
        let whole = Message::from_vec(&encode(full, 65_535).unwrap()).unwrap();
        assert!(!whole.metadata.truncation);
        assert_eq!(whole.answers.len(), 300);
    }

    #[test]
    fn before_the_first_list_nothing_is_denied() {
        let zone = Zone::new("cluster.local");
        let response = respond(&zone, "web.default.svc.cluster.local.", RecordType::A);
        assert_eq!(response.metadata.response_code, ResponseCode::ServFail);
    }
}
