//! Bandwidth limits of pods: a token bucket on each end of the pod's link.
//!
//! The bucket on the host's end limits what goes to the pod, the one on the pod's end what comes from it.

use futures::StreamExt;
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};
use rtnetlink::Handle;
use rtnetlink::packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};

use super::links::Error;

/// Attributes of `tbf`.
const PARAMETERS: u16 = 1;
const RATE64: u16 = 4;
const BURST: u16 = 6;
/// Ethernet: the kernel works packet sizes out by itself.
const LINK_LAYER: u8 = 1;
/// The largest packet a link takes in one go, segmentation left to the hardware.
const LARGEST: u64 = 64 << 10;

/// Bytes that may pass at once, and bytes that may wait, for a rate in bytes per second.
fn bucket(rate: u64) -> (u32, u32) {
    let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    // Ten milliseconds' worth at once, twenty-five waiting.
    let burst = (rate / 100).max(LARGEST);
    (narrow(burst), narrow(burst.saturating_add(rate / 40)))
}

/// `struct tc_tbf_qopt`: two `tc_ratespec`, limit, buffer, mtu. Size of the bucket and large rates have attributes.
fn parameters(rate: u64, limit: u32) -> Vec<u8> {
    let mut out = vec![0, LINK_LAYER, 0, 0, 0, 0, 0, 0];
    out.extend_from_slice(&u32::try_from(rate).unwrap_or(u32::MAX).to_ne_bytes());
    out.extend_from_slice(&[0; 12]);
    out.extend_from_slice(&limit.to_ne_bytes());
    out.extend_from_slice(&[0; 8]);
    out
}

/// Limits what leaves by a link to so many bits per second.
pub(crate) async fn limit(handle: &Handle, link: u32, name: &str, bits: u64) -> Result<(), Error> {
    let rate = (bits / 8).max(1);
    let (burst, waiting) = bucket(rate);
    let option = |kind, value: &[u8]| TcOption::Other(DefaultNla::new(kind, value.to_vec()));
    let mut options = vec![option(PARAMETERS, &parameters(rate, waiting)), option(BURST, &burst.to_ne_bytes())];
    if u32::try_from(rate).is_err() {
        options.push(option(RATE64, &rate.to_ne_bytes()));
    }
    let mut message = TcMessage::with_index(i32::try_from(link).unwrap_or(i32::MAX));
    message.header.parent = TcHandle::ROOT;
    message.attributes = vec![TcAttribute::Kind("tbf".into()), TcAttribute::Options(options)];
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    let what = || format!("limit {name} to {bits} bits per second");
    let mut answers = handle.clone().request(request).map_err(|e| Error::new(what(), e))?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            return Err(Error::new(what(), rtnetlink::Error::NetlinkError(error)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_the_largest_packet() {
        assert_eq!(bucket(1), (65_536, 65_536));
        assert_eq!(bucket(125_000_000), (1_250_000, 1_250_000 + 3_125_000));
        assert_eq!(bucket(u64::MAX).0, u32::MAX);
        assert_eq!(parameters(1, 2).len(), 36);
    }
}
