//! IP addresses and CIDRs.

use std::net::{IpAddr, Ipv4Addr};

use super::{At, Errs};

const NOT_AN_IP: &str = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
const NOT_A_CIDR: &str = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";

/// Parses an address; leading zeros in IPv4 octets are told apart.
pub(crate) fn parse_ip(s: &str) -> Result<IpAddr, &'static str> {
    if let Ok(ip) = s.parse() {
        return Ok(ip);
    }
    let octets: Vec<&str> = s.split('.').collect();
    let numeric = octets.len() == 4 && octets.iter().all(|o| o.parse::<u8>().is_ok());
    Err(if numeric { "must not have leading 0s" } else { NOT_AN_IP })
}

/// Messages for an address in new fields: canonical form, no IPv4-mapped IPv6.
pub(crate) fn ip_messages(s: &str) -> Vec<String> {
    match parse_ip(s) {
        Err(message) => vec![message.to_owned()],
        Ok(IpAddr::V6(v6)) if v6.to_ipv4_mapped().is_some() => {
            vec!["must not be an IPv4-mapped IPv6 address".to_owned()]
        }
        Ok(_) => Vec::new(),
    }
}

/// Messages for the name of an IPAddress object.
pub(crate) fn canonical_ip_messages(s: &str) -> Vec<String> {
    match parse_ip(s) {
        Err(_) => vec![NOT_AN_IP.to_owned()],
        Ok(ip) if ip.to_string() != s => vec![format!("must be in canonical form (\"{ip}\")")],
        Ok(_) => Vec::new(),
    }
}

/// An IP address.
pub(crate) fn ip(e: &mut Errs, at: &At<'_>) -> bool {
    let messages = ip_messages(at.s());
    let ok = messages.is_empty();
    e.messages(at, messages);
    ok
}

/// A parsed CIDR: address as written and prefix length.
pub(crate) fn parse_cidr(s: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = s.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    if prefix.len() > 1 && prefix.starts_with('0') {
        return None;
    }
    let prefix: u8 = prefix.parse().ok()?;
    (prefix <= if address.is_ipv4() { 32 } else { 128 }).then_some((address, prefix))
}

/// A CIDR.
pub(crate) fn cidr(e: &mut Errs, at: &At<'_>) -> bool {
    match parse_cidr(at.s()) {
        None => {
            e.invalid_str(at, NOT_A_CIDR);
            false
        }
        Some((address, prefix)) => {
            let canonical = ipnet::IpNet::new(address, prefix).map(|net| net.trunc());
            if let Ok(net) = canonical
                && net.addr() != address
            {
                e.invalid_str(at, "must not have bits set beyond the prefix length");
                return false;
            }
            true
        }
    }
}

/// An address that other machines may use: not unspecified, loopback, link-local or multicast of link scope.
pub(crate) fn non_special_ip(e: &mut Errs, at: &At<'_>) {
    let Ok(ip) = parse_ip(at.s()) else {
        return e.invalid_str(at, "must be a valid IP address");
    };
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.segments()[0] & 0xffc0 == 0xfe80,
    };
    let link_multicast = match ip {
        IpAddr::V4(v4) => v4.octets()[..3] == Ipv4Addr::new(224, 0, 0, 0).octets()[..3],
        IpAddr::V6(v6) => v6.segments()[0] & 0xff0f == 0xff02,
    };
    if ip.is_unspecified() {
        e.invalid_str(at, &format!("may not be unspecified ({})", at.s()));
    }
    if ip.is_loopback() {
        e.invalid_str(at, "may not be in the loopback range (127.0.0.0/8, ::1/128)");
    }
    if link_local {
        e.invalid_str(at, "may not be in the link-local range (169.254.0.0/16, fe80::/10)");
    }
    if link_multicast {
        e.invalid_str(at, "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)");
    }
}

/// `IPv4` or `IPv6`.
pub(crate) fn family(ip: &str) -> &'static str {
    if ip.contains(':') { "IPv6" } else { "IPv4" }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(ip_messages("01.2.3.4"), ["must not have leading 0s"]);
        assert_eq!(ip_messages("x"), [NOT_AN_IP]);
        assert!(ip_messages("2001:db8::1").is_empty());
        assert_eq!(canonical_ip_messages("2001:DB8::1").len(), 1);
    }

    #[test]
    fn special_addresses() {
        for (ip, errors) in
            [("127.0.0.1", 1), ("169.254.1.1", 1), ("0.0.0.0", 1), ("224.0.0.5", 1), ("10.0.0.1", 0), ("fe80::1", 1)]
        {
            let obj = json!({"ip": ip});
            let mut e = Errs::new();
            non_special_ip(&mut e, &At::field(&obj, "ip"));
            assert_eq!(e.0.len(), errors, "{ip}");
        }
    }

    #[test]
    fn cidrs() {
        assert!(parse_cidr("10.0.0.0/24").is_some());
        assert!(parse_cidr("10.0.0.0/33").is_none());
        assert!(parse_cidr("10.0.0.0/08").is_none());
    }
}
