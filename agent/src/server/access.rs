//! Who gets in: certificate, bearer token or nobody, and what the API server lets them do.

use http::{Method, Request, StatusCode, header};

use super::{Host, Identity};

/// An answer instead of the one that was asked for.
type Refusal = (StatusCode, String);

/// The subresources of `nodes` that allow a path; any of them does.
fn subresources(path: &[&str]) -> &'static [&'static str] {
    match path.first().copied().unwrap_or_default() {
        "stats" => &["stats"],
        "metrics" => &["metrics"],
        "logs" => &["log"],
        "checkpoint" => &["checkpoint"],
        "pods" | "runningpods" => &["pods", "proxy"],
        "healthz" => &["healthz", "proxy"],
        "configz" => &["configz", "proxy"],
        _ => &["proxy"],
    }
}

fn verb(method: &Method) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "get",
    }
}

fn bearer<B>(request: &Request<B>) -> Option<&str> {
    let value = request.headers().get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    Some(token.trim()).filter(|t| scheme.eq_ignore_ascii_case("bearer") && !t.is_empty())
}

async fn identify<B>(host: &dyn Host, known: Option<&Identity>, request: &Request<B>) -> Result<Identity, Refusal> {
    let nobody = || (StatusCode::UNAUTHORIZED, "Unauthorized".to_string());
    if let Some(known) = known {
        return Ok(known.clone());
    }
    match bearer(request).map(str::to_owned) {
        Some(token) => match host.authenticate(&token).await {
            Ok(found) => found.ok_or_else(nobody),
            Err(error) => {
                tracing::warn!(error, "a token cannot be reviewed");
                Err(nobody())
            }
        },
        None if host.anonymous() => {
            Ok(Identity { user: "system:anonymous".into(), groups: vec!["system:unauthenticated".into()] })
        }
        None => Err(nobody()),
    }
}

/// Lets a request pass or says why not.
pub(super) async fn check<B>(
    host: &dyn Host,
    known: Option<&Identity>,
    request: &Request<B>,
    path: &[&str],
) -> Result<(), Refusal> {
    let who = identify(host, known, request).await?;
    if known.is_some() && who.trusted() {
        return Ok(());
    }
    let (verb, wanted) = (verb(request.method()), subresources(path));
    for subresource in wanted {
        match host.allowed(&who, verb, subresource).await {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => {
                let text = format!(
                    "Authorization error (user={}, verb={verb}, resource=nodes, subresource(s)={wanted:?}): {error}",
                    who.user
                );
                return Err((StatusCode::INTERNAL_SERVER_ERROR, text));
            }
        }
    }
    let wanted = wanted.join(" ");
    let text = format!("Forbidden (user={}, verb={verb}, resource=nodes, subresource(s)=[{wanted}])", who.user);
    Err((StatusCode::FORBIDDEN, text))
}

#[cfg(test)]
mod tests {
    use futures::future::BoxFuture;

    use super::{super::*, *};

    /// Knows one token, whose owner may read metrics.
    struct One;

    impl Host for One {
        fn exec(&self, _: ExecRequest) -> BoxFuture<'_, Result<Session, HostError>> {
            Box::pin(async { Err(HostError::NotFound(String::new())) })
        }

        fn attach(&self, _: AttachRequest) -> BoxFuture<'_, Result<Session, HostError>> {
            Box::pin(async { Err(HostError::NotFound(String::new())) })
        }

        fn authenticate<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Option<Identity>, String>> {
            let found = (token == "good").then(|| Identity { user: "reader".into(), groups: vec![] });
            Box::pin(async move { Ok(found) })
        }

        fn allowed<'a>(
            &'a self,
            who: &'a Identity,
            verb: &'a str,
            subresource: &'a str,
        ) -> BoxFuture<'a, Result<bool, String>> {
            Box::pin(async move { Ok((who.user.as_str(), verb, subresource) == ("reader", "get", "metrics")) })
        }
    }

    #[tokio::test]
    async fn tokens_and_permissions_decide() {
        let admin = Identity { user: "root".into(), groups: vec!["system:masters".into()] };
        let plain = Identity { user: "joe".into(), groups: vec![] };
        for (token, certificate, method, path, want) in [
            ("Bearer good", None, Method::GET, "metrics", None),
            ("bearer good", None, Method::GET, "metrics", None),
            ("Bearer bad", None, Method::GET, "metrics", Some(401)),
            ("Basic good", None, Method::GET, "metrics", Some(401)),
            ("", None, Method::GET, "metrics", Some(401)),
            ("Bearer good", None, Method::POST, "metrics", Some(403)),
            ("Bearer good", None, Method::GET, "exec", Some(403)),
            ("", Some(&admin), Method::POST, "exec", None),
            ("", Some(&plain), Method::GET, "metrics", Some(403)),
        ] {
            let request = Request::builder().method(&method).header("authorization", token).body(()).unwrap();
            let got = check(&One, certificate, &request, &[path]).await;
            assert_eq!(got.err().map(|(s, _)| s.as_u16()), want, "{token} {certificate:?} {method} {path}");
        }
    }
}
