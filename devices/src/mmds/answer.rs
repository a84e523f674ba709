//! What a guest's request is answered with.
//!
//! | request                    | V1                            | V2                          |
//! |----------------------------|-------------------------------|-----------------------------|
//! | `GET PATH`                 | the value; a token is only    | 401 without a good token,   |
//! |                            | looked at, to be counted      | else the value              |
//! | `PUT /latest/api/token`    | a token                       | a token                     |
//! | `PUT` of anything else     | 404                           | 404                         |
//! | `PATCH`, `DELETE`          | 405                           | 405                         |
//!
//! V1 hands out tokens too, so that a guest can be moved to V2 before the host is. The headers
//! of EC2's service are understood beside the service's own in both versions; the option
//! `imds_compat` is about the format of values only.

use std::time::Duration;

use super::{
    Mmds, MmdsVersion,
    http::{Method, Request, Response, parse},
    store::{Format, NoValue},
    token::TTL,
};

const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
const TOKEN_TTL: [&str; 2] = ["X-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token-ttl-seconds"];

/// The answer to one request, given its bytes up to the empty line.
pub(super) fn answer(mmds: &Mmds, head: &[u8], now: Duration) -> Response {
    let request = match parse(head) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    let response = match request.method {
        _ if request.path.is_empty() => Response::text(400, "Invalid URI."),
        Method::Get => get(mmds, &request, now),
        Method::Put => put(mmds, &request, now),
        Method::Other => Response {
            header: Some(("Allow", "GET, PUT".to_owned())),
            ..Response::text(405, "Only GET and PUT are allowed here.")
        },
    };
    Response { minor: request.minor, close: request.close, ..response }
}

fn get(mmds: &Mmds, request: &Request<'_>, now: Duration) -> Response {
    let config = mmds.config();
    let strict = config.version == MmdsVersion::V2;
    match request.header(&TOKEN) {
        None => {
            mmds.counters.rx_no_token.increment();
            if strict {
                let [own, ec2] = TOKEN;
                let text = format!("There is no session token. It belongs into header {own} or {ec2}.");
                return Response::text(401, text);
            }
        }
        Some((_, token)) if !mmds.mint.is_valid(token, now) => {
            mmds.counters.rx_invalid_token.increment();
            if strict {
                return Response::text(401, "The session token is not valid.");
            }
        }
        Some(_) => {}
    }
    let json = request.wants_json && !config.imds_compat;
    let format = if json { Format::Json } else { Format::Imds };
    match mmds.store.read(&clean(request.path), format) {
        Ok(body) => Response { json, ..Response::text(200, body) },
        Err(NoValue::Missing) => Response::text(404, not_found(request.path)),
        Err(NoValue::NotListable) => {
            Response::text(501, "The value is neither a string nor an object; it can be had as JSON only.")
        }
    }
}

fn put(mmds: &Mmds, request: &Request<'_>, now: Duration) -> Response {
    // A proxy that can be made to ask for a token must not get one.
    if let Some((name, _)) = request.header(&["X-Forwarded-For"]) {
        return Response::text(400, format!("Unsupported header: {name}."));
    }
    if clean(request.path) != TOKEN_PATH {
        return Response::text(404, not_found(request.path));
    }
    let Some((name, value)) = request.header(&TOKEN_TTL) else {
        let [own, ec2] = TOKEN_TTL;
        let text = format!("There is no life time for the token. It belongs into header {own} or {ec2}.");
        return Response::text(400, text);
    };
    let Ok(ttl) = value.parse::<u32>() else {
        return Response::text(400, format!("Invalid value of header {name}: {value}."));
    };
    if !TTL.contains(&ttl) {
        let (min, max) = (TTL.start(), TTL.end());
        return Response::text(400, format!("A token lives from {min} to {max} seconds, not {ttl}."));
    }
    Response { header: Some((name, ttl.to_string())), ..Response::text(200, mmds.mint.issue(ttl, now)) }
}

fn not_found(path: &str) -> String {
    format!("Resource not found: {path}.")
}

/// `path` with every run of slashes made one.
fn clean(path: &str) -> String {
    let mut cleaned = String::with_capacity(path.len());
    for character in path.chars() {
        if character != '/' || !cleaned.ends_with('/') {
            cleaned.push(character);
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::mmds::MmdsConfig;

    const NOW: Duration = Duration::from_secs(5);

    fn service(version: MmdsVersion, imds_compat: bool) -> Mmds {
        let mmds = Mmds::new(51_200).unwrap();
        let config = MmdsConfig { version, imds_compat, ..MmdsConfig::for_interface("eth0") };
        mmds.configure(config, &["eth0"]).unwrap();
        mmds.put(json!({"latest": {"meta-data": {"id": "i-1", "n": 4}}, "age": 43})).unwrap();
        mmds
    }

    fn ask(mmds: &Mmds, request: &str) -> Response {
        answer(mmds, format!("{}\r\n\r\n", request.replace('\n', "\r\n")).as_bytes(), NOW)
    }

    fn count(mmds: &Mmds, name: &str) -> u64 {
        mmds.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
    }

    #[test]
    fn version_1_answers_without_a_token_and_counts_what_it_saw() {
        let mmds = service(MmdsVersion::V1, false);
        let plain = ask(&mmds, "GET /latest/meta-data/id HTTP/1.1");
        assert_eq!((plain.status, plain.body.as_str(), plain.json), (200, "i-1", false));
        let forged = ask(&mmds, "GET /latest/meta-data HTTP/1.0\nX-metadata-token: no");
        assert_eq!((forged.status, forged.body.as_str(), forged.minor), (200, "id\nn", 0));
        assert!(forged.close);
        assert_eq!((count(&mmds, "rx_no_token"), count(&mmds, "rx_invalid_token")), (1, 1));
        assert_eq!(ask(&mmds, "PUT /latest/api/token HTTP/1.1\nX-metadata-token-ttl-seconds: 1").status, 200);
    }

    #[test]
    fn version_2_wants_a_token_by_either_name() {
        let mmds = service(MmdsVersion::V2, false);
        assert_eq!(ask(&mmds, "GET /latest HTTP/1.1").status, 401);
        assert_eq!(ask(&mmds, "GET /latest HTTP/1.1\nX-metadata-token: no").status, 401);
        for (asking, using) in [(TOKEN_TTL[0], TOKEN[0]), (TOKEN_TTL[1], TOKEN[1]), (TOKEN_TTL[0], TOKEN[1])]
        {
            let given =
                ask(&mmds, &format!("PUT //latest/api///token HTTP/1.1\n{}: 60", asking.to_lowercase()));
            assert_eq!((given.status, &given.header), (200, &Some((asking, "60".to_owned()))));
            let get = format!("GET /latest HTTP/1.1\n{using}: {}", given.body);
            assert_eq!(ask(&mmds, &get).body, "meta-data/");
            let head = format!("{}\r\n\r\n", get.replace('\n', "\r\n"));
            assert_eq!(answer(&mmds, head.as_bytes(), NOW + Duration::from_secs(60)).status, 401, "expired");
        }
        assert_eq!((count(&mmds, "rx_no_token"), count(&mmds, "rx_invalid_token")), (1, 4));
    }

    #[test]
    fn a_token_is_refused_for_every_reason_there_is() {
        let mmds = service(MmdsVersion::V2, false);
        for (request, status) in [
            ("PUT /latest/api/token HTTP/1.1", 400),
            ("PUT /latest/api/token HTTP/1.1\nX-metadata-token-ttl-seconds: 0", 400),
            ("PUT /latest/api/token HTTP/1.1\nX-metadata-token-ttl-seconds: 21601", 400),
            ("PUT /latest/api/token HTTP/1.1\nX-metadata-token-ttl-seconds: ten", 400),
            ("PUT /latest/api/token HTTP/1.1\nX-metadata-token-ttl-seconds: 4294967296", 400),
            ("PUT /latest/api/token HTTP/1.1\nX-metadata-token-ttl-seconds: 9\nX-Forwarded-For: a", 400),
            ("PUT /latest/api/token/ HTTP/1.1\nX-metadata-token-ttl-seconds: 9", 404),
            ("PUT /latest HTTP/1.1\nX-metadata-token-ttl-seconds: 9", 404),
            ("PUT nowhere HTTP/1.1\nX-metadata-token-ttl-seconds: 9", 400),
            ("PUT /latest/api/token HTTP/1.1\nX-metadata-token-ttl-seconds: 21600", 200),
        ] {
            assert_eq!(ask(&mmds, request).status, status, "{request}");
        }
    }

    #[test]
    fn values_come_in_the_format_asked_for() {
        let mmds = service(MmdsVersion::V1, false);
        let json = ask(&mmds, "GET /latest/meta-data/ HTTP/1.1\nAccept: application/json");
        assert_eq!((json.json, json.body.as_str()), (true, r#"{"id":"i-1","n":4}"#));
        assert_eq!(ask(&mmds, "GET /age HTTP/1.1\nAccept: application/json").body, "43");
        assert_eq!(ask(&mmds, "GET /age HTTP/1.1").status, 501);
        let missing = ask(&mmds, "GET //x HTTP/1.1");
        assert_eq!((missing.status, missing.body.as_str()), (404, "Resource not found: //x."));
    }

    #[test]
    fn compatible_services_know_only_one_format() {
        let mmds = service(MmdsVersion::V1, true);
        let listed = ask(&mmds, "GET / HTTP/1.1\nAccept: application/json");
        assert_eq!((listed.json, listed.body.as_str()), (false, "age\nlatest/"));
        assert_eq!(ask(&mmds, "GET /age HTTP/1.1\nAccept: application/json").status, 501);
    }

    #[test]
    fn other_methods_are_told_which_are_allowed() {
        for version in [MmdsVersion::V1, MmdsVersion::V2] {
            let refused = ask(&service(version, false), "PATCH /latest HTTP/1.1");
            assert_eq!((refused.status, refused.header), (405, Some(("Allow", "GET, PUT".to_owned()))));
        }
    }
}
