// SPDX-License-Identifier: Apache-2.0
//! The resolver's words: what a query asks, and the answer to it. No input and output.
//!
//! Software that waits for a resolver hangs, so every query that can be answered is, at once: an allowed name with
//! its synthetic addresses, everything else negatively. Nothing is asked of any other server here: the real name is
//! resolved only when a connection to it has been checked, so a query carries nothing out.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{DNSClass, RData, Record, RecordType};

use super::filter::is_own_range;
use super::policy::normal_name;

/// How long an answer may be remembered, seconds. The address never changes, the policy may.
const TTL: u32 = 60;
/// What we accept over UDP, bytes; answers have one record and never come near it.
const PAYLOAD: u16 = 1232;

/// A query, understood.
#[derive(Debug)]
pub(crate) enum Asked {
    /// For an address of a name (already normal, see [`normal_name`]).
    Name { query: Box<Message>, name: String, kind: Kind },
    /// Answered as it stands. `denied`: the name asked for, when that is to be audited.
    Done { answer: Vec<u8>, denied: Option<String> },
    /// Not even an answer is possible.
    Nothing,
}

/// What is asked about an allowed name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    V4,
    V6,
    /// Something that such names have none of.
    Other,
}

/// What is known of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    Addresses(Ipv4Addr, Ipv6Addr),
    Denied,
    /// The control plane cannot be asked now.
    Unavailable,
}

/// Reads a query.
pub(crate) fn read(bytes: &[u8]) -> Asked {
    let Some((id, flags)) = bytes.first_chunk::<3>().map(|[a, b, c]| (u16::from_be_bytes([*a, *b]), *c))
    else {
        return Asked::Nothing;
    };
    if flags & 0x80 != 0 {
        return Asked::Nothing;
    }
    let opcode = OpCode::from_u8(flags >> 3 & 0xf);
    let Ok(query) = Message::from_vec(bytes) else {
        return done(&Message::error_msg(id, opcode, ResponseCode::FormErr), None);
    };
    let mut reply = reply_to(&query);
    if query.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        reply.metadata.response_code = ResponseCode::BADVERS;
        return done(&reply, None);
    }
    if query.metadata.op_code != OpCode::Query {
        reply.metadata.response_code = ResponseCode::NotImp;
        return done(&reply, None);
    }
    let [question] = query.queries.as_slice() else {
        reply.metadata.response_code = ResponseCode::FormErr;
        return done(&reply, None);
    };
    let said = question.name().to_ascii();
    let kind = match question.query_type() {
        _ if question.query_class() != DNSClass::IN => {
            reply.metadata.response_code = ResponseCode::Refused;
            return done(&reply, Some(said));
        }
        RecordType::AXFR | RecordType::IXFR => {
            reply.metadata.response_code = ResponseCode::Refused;
            return done(&reply, Some(said));
        }
        RecordType::PTR => {
            reply.metadata.response_code = ResponseCode::NXDomain;
            let ours = question.name().parse_arpa_name().is_ok_and(|net| is_own_range(net.addr()));
            return done(&reply, (!ours).then_some(said));
        }
        RecordType::A => Kind::V4,
        RecordType::AAAA => Kind::V6,
        _ => Kind::Other,
    };
    if let Some(name) = normal_name(&said) {
        return Asked::Name { query: Box::new(query), name, kind };
    }
    reply.metadata.response_code = ResponseCode::NXDomain;
    done(&reply, Some(said))
}

/// Answers a query for a name.
pub(crate) fn answer(query: &Message, kind: Kind, known: Known) -> Vec<u8> {
    let mut reply = reply_to(query);
    match known {
        Known::Denied => reply.metadata.response_code = ResponseCode::NXDomain,
        Known::Unavailable => reply.metadata.response_code = ResponseCode::ServFail,
        Known::Addresses(v4, v6) => {
            let data = match kind {
                Kind::V4 => Some(RData::A(A(v4))),
                Kind::V6 => Some(RData::AAAA(AAAA(v6))),
                Kind::Other => None,
            };
            if let (Some(data), Some(question)) = (data, query.queries.first()) {
                reply.answers.push(Record::from_rdata(question.name().clone(), TTL, data));
            }
        }
    }
    encode(&reply)
}

/// "Ask again": the proxy has too much to do.
pub(crate) fn busy(bytes: &[u8]) -> Vec<u8> {
    match read(bytes) {
        Asked::Name { query, kind, .. } => answer(&query, kind, Known::Unavailable),
        Asked::Done { answer, .. } => answer,
        Asked::Nothing => Vec::new(),
    }
}

fn reply_to(query: &Message) -> Message {
    let mut reply = Message::new(query.metadata.id, MessageType::Response, query.metadata.op_code);
    reply.metadata.recursion_desired = query.metadata.recursion_desired;
    reply.metadata.checking_disabled = query.metadata.checking_disabled;
    reply.metadata.recursion_available = true;
    reply.metadata.authoritative = false;
    // In the asker's own spelling.
    reply.queries = query.queries.iter().map(Query::clone).collect();
    if query.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(PAYLOAD);
        edns.set_version(0);
        reply.edns = Some(edns);
    }
    reply
}

fn done(reply: &Message, denied: Option<String>) -> Asked {
    Asked::Done { answer: encode(reply), denied }
}

fn encode(reply: &Message) -> Vec<u8> {
    reply.to_vec().unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot encode a DNS answer");
        Message::error_msg(reply.metadata.id, reply.metadata.op_code, ResponseCode::ServFail)
            .to_vec()
            .unwrap_or_default()
    })
}

/// Reads an address as the control plane writes it.
pub(crate) fn addresses(v4: &str, v6: &str) -> Option<(Ipv4Addr, Ipv6Addr)> {
    let (v4, v6) = (v4.parse().ok()?, v6.parse().ok()?);
    let synthetic = |ip: IpAddr| super::filter::is_synthetic(ip);
    (synthetic(IpAddr::V4(v4)) && synthetic(IpAddr::V6(v6))).then_some((v4, v6))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::Name;
    use proptest::prelude::*;

    const V4: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 5);
    const V6: Ipv6Addr = Ipv6Addr::new(0xfd17, 0x5a, 0, 0, 0, 0, 0, 5);

    fn query(name: &str, kind: RecordType) -> Message {
        let mut message = Message::new(77, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.queries.push(Query::query(Name::from_ascii(name).unwrap(), kind));
        message
    }

    fn ask(message: &Message, known: Known) -> (Message, Option<String>) {
        let bytes = message.to_vec().unwrap();
        match read(&bytes) {
            Asked::Name { query, kind, .. } => {
                (Message::from_vec(&answer(&query, kind, known)).unwrap(), None)
            }
            Asked::Done { answer, denied } => (Message::from_vec(&answer).unwrap(), denied),
            Asked::Nothing => panic!("no answer"),
        }
    }

    #[test]
    fn allowed_names_have_both_addresses_and_nothing_else() {
        let known = Known::Addresses(V4, V6);
        for (kind, expected) in [
            (RecordType::A, Some(RData::A(A(V4)))),
            (RecordType::AAAA, Some(RData::AAAA(AAAA(V6)))),
            (RecordType::HTTPS, None),
            (RecordType::SVCB, None),
            (RecordType::MX, None),
            (RecordType::TXT, None),
            (RecordType::ANY, None),
        ] {
            let (reply, denied) = ask(&query("aPi.Example.com.", kind), known);
            assert_eq!(reply.metadata.response_code, ResponseCode::NoError, "{kind}");
            assert_eq!(reply.answers.first().map(|record| record.data.clone()), expected, "{kind}");
            assert!(denied.is_none() && reply.edns.is_none());
            assert_eq!(reply.metadata.id, 77);
            assert!(reply.metadata.recursion_desired && reply.metadata.recursion_available);
            assert_eq!(reply.queries[0].name().to_ascii(), "aPi.Example.com.", "the asker's spelling");
        }
    }

    #[test]
    fn names_are_normal_and_negative_answers_differ() {
        let bytes = query("aPi.Example.com.", RecordType::A).to_vec().unwrap();
        assert!(
            matches!(read(&bytes), Asked::Name { name, kind: Kind::V4, .. } if name == "api.example.com")
        );
        let (reply, _) = ask(&query("x.test.", RecordType::A), Known::Denied);
        assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
        let (reply, _) = ask(&query("x.test.", RecordType::A), Known::Unavailable);
        assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    }

    #[test]
    fn reverse_questions_are_answered_at_once_and_our_own_quietly() {
        for (name, audited) in [
            ("2.17.254.169.in-addr.arpa.", false),
            ("5.0.18.198.in-addr.arpa.", false),
            ("1.0.0.127.in-addr.arpa.", false),
            ("2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.7.1.d.f.ip6.arpa.", false),
            ("8.8.8.8.in-addr.arpa.", true),
            ("not.an.address.", true),
        ] {
            let (reply, denied) = ask(&query(name, RecordType::PTR), Known::Denied);
            assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain, "{name}");
            assert_eq!(denied.is_some(), audited, "{name}");
        }
    }

    #[test]
    fn edns_is_answered_and_later_versions_are_not() {
        let mut message = query("x.test.", RecordType::A);
        let mut edns = Edns::new();
        edns.set_max_payload(4096);
        message.edns = Some(edns.clone());
        let (reply, _) = ask(&message, Known::Addresses(V4, V6));
        assert_eq!(reply.edns.as_ref().map(Edns::max_payload), Some(PAYLOAD));
        assert_eq!(reply.answers.len(), 1);
        edns.set_version(1);
        message.edns = Some(edns);
        let (reply, _) = ask(&message, Known::Addresses(V4, V6));
        assert_eq!(u16::from(reply.metadata.response_code), 16);
        assert!(reply.answers.is_empty());
    }

    #[test]
    fn odd_messages_get_the_error_that_fits() {
        let code = |message: &Message| ask(message, Known::Denied).0.metadata.response_code;
        let mut two = query("x.test.", RecordType::A);
        two.queries.push(two.queries[0].clone());
        assert_eq!(code(&two), ResponseCode::FormErr);
        let mut none = query("x.test.", RecordType::A);
        none.queries.clear();
        assert_eq!(code(&none), ResponseCode::FormErr);
        let mut chaos = query("version.bind.", RecordType::TXT);
        chaos.queries[0].set_query_class(DNSClass::CH);
        assert_eq!(code(&chaos), ResponseCode::Refused);
        assert_eq!(code(&query("x.test.", RecordType::AXFR)), ResponseCode::Refused);
        let mut update = query("x.test.", RecordType::SOA);
        update.metadata.op_code = OpCode::Status;
        assert_eq!(code(&update), ResponseCode::NotImp);
        assert_eq!(code(&query(".", RecordType::NS)), ResponseCode::NXDomain);

        let mut cut = query("x.test.", RecordType::A).to_vec().unwrap();
        cut.truncate(15);
        let Asked::Done { answer, .. } = read(&cut) else { panic!() };
        let reply = Message::from_vec(&answer).unwrap();
        assert_eq!((reply.metadata.id, reply.metadata.response_code), (77, ResponseCode::FormErr));
        assert!(matches!(read(&[1, 2]), Asked::Nothing));
        let response = Message::new(7, MessageType::Response, OpCode::Query).to_vec().unwrap();
        assert!(matches!(read(&response), Asked::Nothing), "an answer to an answer would loop");
    }

    #[test]
    fn a_compression_loop_is_a_format_error() {
        let mut bytes = vec![0, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        bytes.extend([0xc0, 0x0c, 0, 1, 0, 1]);
        let Asked::Done { answer, .. } = read(&bytes) else { panic!() };
        assert_eq!(Message::from_vec(&answer).unwrap().metadata.response_code, ResponseCode::FormErr);
    }

    #[test]
    fn only_synthetic_addresses_are_taken() {
        assert_eq!(addresses("198.18.0.5", "fd17:5a::5"), Some((V4, V6)));
        assert_eq!(addresses("127.0.0.1", "fd17:5a::5"), None);
        assert_eq!(addresses("198.18.0.5", "::1"), None);
        assert_eq!(addresses("", ""), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            match read(&bytes) {
                Asked::Name { query, kind, .. } => {
                    let reply = answer(&query, kind, Known::Addresses(V4, V6));
                    prop_assert!(reply.len() < usize::from(PAYLOAD));
                }
                Asked::Done { answer, .. } => prop_assert!(answer.len() >= 12),
                Asked::Nothing => {}
            }
            busy(&bytes);
        }
    }
}
