//! Rules that make more or less of a request than one answer: retries, timeouts, faults.

use serde_json::{Value, json};

use super::{
    End,
    routes::{ANSWER, Of, all_paths, route, rule},
};

/// A retry policy as Istio makes one.
pub fn retries(on: &str, number: u32, more: Value) -> Value {
    let mut policy = json!({"retry_on": on, "num_retries": number, "host_selection_retry_max_attempts": "5",
        "retry_host_predicate": [{"name": "envoy.retry_host_predicates.previous_hosts", "typed_config":
            {"@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"}}]});
    policy.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    json!({"retry_policy": policy})
}

/// Rules that make more or less than one attempt of a request, each with what the upstream answers.
pub fn resilience() -> Vec<(&'static str, Value, Value, &'static str, End)> {
    const BUSY: &str = "HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\nno";
    let of = |name: &'static str, istio: Value, envoy: Value, answer: &'static str, end: End| {
        (name, json!([rule(istio)]), json!([route(all_paths(), envoy, json!({}))]), answer, end)
    };
    let attempts = |n: u32, on: &str| json!({"retries": {"attempts": n, "retryOn": on, "backoff": "10ms"}});
    let backoff = || json!({"retry_back_off": {"base_interval": "0.010s"}});
    vec![
        of("5xx", attempts(2, "5xx"), retries("5xx", 2, backoff()), BUSY, End::Keep),
        of("gateway-error", attempts(1, "gateway-error"), retries("gateway-error", 1, backoff()), BUSY, End::Keep),
        of(
            "gateway-error-500",
            attempts(1, "gateway-error"),
            retries("gateway-error", 1, backoff()),
            "HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n",
            End::Keep,
        ),
        of(
            "409",
            attempts(1, "retriable-4xx"),
            retries("retriable-4xx", 1, backoff()),
            "HTTP/1.1 409 X\r\ncontent-length: 0\r\n\r\n",
            End::Keep,
        ),
        of("reset", attempts(1, "reset"), retries("reset", 1, backoff()), "", End::Reset),
        of("reset-by-fin", attempts(1, "reset"), retries("reset", 1, backoff()), "", End::Fin),
        of("reset-of-a-head", attempts(1, "reset"), retries("reset", 1, backoff()), "HTTP/1.1 2", End::Fin),
        of("reset-by-garbage", attempts(1, "reset"), retries("reset", 1, backoff()), "garbage\r\n\r\n", End::Keep),
        of("connect-failure-reset", attempts(1, "connect-failure"), retries("connect-failure", 1, backoff()), "", End::Reset),
        of(
            "by-number",
            attempts(1, "418,connect-failure"),
            retries(
                "connect-failure,retriable-status-codes",
                1,
                json!({"retriable_status_codes": [418], "retry_back_off": {"base_interval": "0.010s"}}),
            ),
            "HTTP/1.1 418 X\r\ncontent-length: 0\r\n\r\n",
            End::Keep,
        ),
        of("none", json!({"retries": {"attempts": 0}}), json!({}), BUSY, End::Keep),
        of("default-503", json!({}), retries("connect-failure,refused-stream,unavailable,cancelled", 2, json!({})), BUSY, End::Keep),
        of("default-reset", json!({}), retries("connect-failure,refused-stream,unavailable,cancelled", 2, json!({})), "", End::Reset),
        of("timeout", json!({"timeout": "0.1s"}), json!({"timeout": "0.1s"}), "", End::Keep),
        of(
            "timeout-of-an-attempt",
            json!({"retries": {"attempts": 1, "perTryTimeout": "0.1s", "retryOn": "5xx", "backoff": "10ms"}}),
            retries("5xx", 1, json!({"per_try_timeout": "0.1s", "retry_back_off": {"base_interval": "0.010s"}})),
            "",
            End::Keep,
        ),
        of(
            "timeout-of-a-body",
            json!({"timeout": "0.1s"}),
            json!({"timeout": "0.1s"}),
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nok",
            End::Keep,
        ),
        of("timeout-of-grpc", json!({"timeout": "20s"}), json!({"timeout": "20s"}), ANSWER, End::Keep),
        of("timeout-not-reached", json!({"timeout": "5s"}), json!({"timeout": "5s"}), ANSWER, End::Keep),
    ]
}

/// Faults, alone and with CORS, whose filter comes after theirs.
pub fn faults() -> Vec<Of> {
    let requests: &[&str] = &[
        "/a",
        "HEAD /a",
        "/a|content-type: application/grpc",
        "/a|origin: http://good.example",
        "OPTIONS /a|origin: http://good.example\r\naccess-control-request-method: PUT",
    ];
    let of = |name: &'static str, mut istio: Value, mut envoy: Value| {
        envoy["@type"] = "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault".into();
        istio["corsPolicy"] = json!({"allowOrigins": [{"exact": "http://good.example"}], "allowMethods": ["PUT"]});
        let cors = json!({"@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy", "filter_enabled": {"default_value": {"numerator": 100}},
            "allow_origin_string_match": [{"exact": "http://good.example"}], "allow_methods": "PUT", "forward_not_matching_preflights": true});
        let filters = json!({"typed_per_filter_config": {"envoy.filters.http.fault": envoy, "envoy.filters.http.cors": cors}});
        (name, json!([rule(istio)]), json!([route(all_paths(), json!({}), filters)]), requests)
    };
    let always = || json!({"numerator": 100});
    vec![
        of(
            "abort",
            json!({"fault": {"abort": {"httpStatus": 418, "percentage": {"value": 100}}}}),
            json!({"abort": {"http_status": 418, "percentage": always()}}),
        ),
        of(
            "abort-503",
            json!({"fault": {"abort": {"httpStatus": 503, "percentage": {"value": 100}}}}),
            json!({"abort": {"http_status": 503, "percentage": always()}}),
        ),
        of(
            "abort-never",
            json!({"fault": {"abort": {"httpStatus": 503, "percentage": {"value": 0}}}}),
            json!({"abort": {"http_status": 503, "percentage": {"numerator": 0}}}),
        ),
        of(
            "abort-grpc",
            json!({"fault": {"abort": {"grpcStatus": "UNAVAILABLE", "percentage": {"value": 100}}}}),
            json!({"abort": {"grpc_status": 14, "percentage": always()}}),
        ),
        of(
            "delay",
            json!({"fault": {"delay": {"fixedDelay": "0.1s", "percentage": {"value": 100}}}}),
            json!({"delay": {"fixed_delay": "0.1s", "percentage": always()}}),
        ),
        of(
            "both",
            json!({"fault": {"delay": {"fixedDelay": "0.05s", "percentage": {"value": 100}}, "abort": {"httpStatus": 500, "percentage": {"value": 100}}}}),
            json!({"delay": {"fixed_delay": "0.05s", "percentage": always()}, "abort": {"http_status": 500, "percentage": always()}}),
        ),
    ]
}
