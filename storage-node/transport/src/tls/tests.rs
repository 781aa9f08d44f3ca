use std::time::{Duration, UNIX_EPOCH};

use super::*;
use crate::identity::{PeerIdentity, PeerRole};
use crate::pki::{Authority, Validity};

struct End {
    tls: TlsSession,
    out: Outgoing,
    leftover: Vec<u8>,
    received: Vec<u8>,
}

impl End {
    fn new(tls: TlsSession) -> End {
        End { tls, out: Outgoing::default(), leftover: Vec::new(), received: Vec::new() }
    }

    fn take(&mut self, from: &mut End) {
        let bytes = from.out.waiting().to_vec();
        from.out.consume(bytes.len());
        self.leftover.extend(bytes);
        let mut plain = |bytes: &[u8]| self.received.extend_from_slice(bytes);
        let decrypted = self.tls.decrypt(&mut self.leftover, &mut self.out, &mut plain).expect("honest bytes");
        self.leftover.drain(..decrypted.consumed);
    }

    fn say(&mut self, plaintext: &[u8]) {
        self.tls.encrypt(plaintext, &mut self.leftover, &mut self.out).expect("secure");
    }

    fn refresh_keys(&mut self) {
        fn refresh<Data>(status: UnbufferedStatus<'_, '_, Data>) {
            let Ok(ConnectionState::WriteTraffic(traffic)) = status.state else { panic!("the session is secure") };
            traffic.refresh_traffic_keys().expect("TLS 1.3 can");
        }
        match &mut self.tls.side {
            Side::Client(connection) => refresh(connection.process_tls_records(&mut self.leftover)),
            Side::Server(connection) => refresh(connection.process_tls_records(&mut self.leftover)),
        }
    }
}

fn ends() -> (End, End) {
    let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
    let validity = Validity { not_before: at(1_000_000_000), not_after: at(10_000_000_000) };
    let authority = Authority::create("test", validity).expect("an authority");
    let roots = Roots::from_pem(authority.certificate_pem()).expect("roots");
    let configs = |role, id| {
        let identity = authority.issue(PeerIdentity { role, id }, validity).expect("issued");
        TlsConfigs::new(&identity, &roots).expect("a configuration")
    };
    let mut client = End::new(configs(PeerRole::Agent, 1).connect().expect("a session"));
    let mut server = End::new(configs(PeerRole::Node, 2).accept().expect("a session"));
    client.tls.decrypt(&mut [], &mut client.out, &mut |_| ()).expect("a client begins");
    while client.tls.is_handshaking() || server.tls.is_handshaking() || !client.out.is_empty() {
        server.take(&mut client);
        client.take(&mut server);
    }
    (client, server)
}

#[test]
fn both_ends_know_each_other_and_agree_on_the_fast_cipher() {
    let (client, server) = ends();
    assert_eq!(client.tls.peer().map(|bearer| bearer.peer), Ok(PeerIdentity { role: PeerRole::Node, id: 2 }));
    assert_eq!(server.tls.peer().map(|bearer| bearer.peer), Ok(PeerIdentity { role: PeerRole::Agent, id: 1 }));
    let Side::Client(connection) = &client.tls.side else { panic!("the client's side") };
    let suite = connection.negotiated_cipher_suite().map(|suite| suite.suite());
    assert_eq!(suite, Some(rustls::CipherSuite::TLS13_AES_128_GCM_SHA256));
}

/// Which happens by itself after some hundred gigabytes, the bound of one AES-GCM key.
#[test]
fn keys_are_refreshed_under_way() {
    let (mut client, mut server) = ends();
    for round in 0..5u8 {
        client.refresh_keys();
        if round % 2 == 0 {
            server.refresh_keys();
        }
        client.say(&[round; 20_000]);
        server.say(&[round; 20_000]);
        let (from_client, from_server) = (&mut client, &mut server);
        from_server.take(from_client);
        from_client.take(from_server);
        assert_eq!(std::mem::take(&mut client.received), [round; 20_000]);
        assert_eq!(std::mem::take(&mut server.received), [round; 20_000]);
    }
}
