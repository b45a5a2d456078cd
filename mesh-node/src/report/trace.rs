//! The context of a trace as requests carry it: W3C Trace Context, and B3 in its single and multiple headers.
//!
//! What came in decides what goes out: the trace goes on, with this span as the parent, in every form it came in, and in the W3C
//! form in any case. Of contexts that contradict each other the W3C one counts, then the single B3 header. What cannot be read is
//! as if it were not there.

use http::{HeaderMap, HeaderName, HeaderValue};

static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
static TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
static B3: HeaderName = HeaderName::from_static("b3");
static B3_TRACE: HeaderName = HeaderName::from_static("x-b3-traceid");
static B3_SPAN: HeaderName = HeaderName::from_static("x-b3-spanid");
static B3_PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
static B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
static B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// Longest `tracestate` that is told, bytes: what W3C has everybody keep.
const LONGEST_STATE: usize = 512;
/// W3C's flags beside `sampled` that are handed on: random.
const HANDED_ON: u8 = 2;

/// What a request says of the trace it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Context {
    /// The trace and the span that caused this; none when there are only decisions, or nothing.
    pub parent: Option<Parent>,
    /// Whether spans are to be written; none when nobody has decided.
    pub sampled: Option<bool>,
    forms: Forms,
    /// W3C's flags beside `sampled`, of which there is one: that the trace's identifier is random.
    flags: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parent {
    pub trace: u128,
    pub span: u64,
}

/// In which forms it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Forms {
    w3c: bool,
    single: bool,
    multiple: bool,
    /// B3 allows identifiers of traces of 64 bits.
    short: bool,
    /// More than sampled: B3's debug.
    debug: bool,
}

impl Context {
    /// What headers say.
    pub fn of(headers: &HeaderMap) -> Self {
        let text = |name: &HeaderName| headers.get(name).and_then(|v| v.to_str().ok());
        let single = text(&B3).and_then(single);
        let multiple = multiple(text);
        // Two of them say nothing.
        let w3c = text(&TRACEPARENT).filter(|_| headers.get_all(&TRACEPARENT).iter().nth(1).is_none()).and_then(traceparent);
        let forms = Forms {
            w3c: w3c.is_some(),
            single: single.is_some(),
            multiple: multiple.is_some(),
            short: single.or(multiple).is_some_and(|c| c.forms.short),
            debug: single.or(multiple).is_some_and(|c| c.forms.debug),
        };
        let first = w3c.or(single).or(multiple).unwrap_or_default();
        Self { forms, ..first }
    }

    /// Whether anything was said.
    pub fn is_given(&self) -> bool {
        self.parent.is_some() || self.sampled.is_some()
    }

    /// W3C's `tracestate`, if it is of this trace.
    pub fn state(&self, headers: &HeaderMap) -> String {
        let all = headers.get_all(&TRACESTATE).iter().filter(|_| self.forms.w3c).filter_map(|v| v.to_str().ok());
        let mut state = all.collect::<Vec<_>>().join(",");
        state.truncate(state.floor_char_boundary(LONGEST_STATE));
        state
    }

    /// Makes headers say that this span is the parent of what they go to.
    pub fn write(&self, span: Parent, sampled: bool, headers: &mut HeaderMap) {
        let Parent { trace, span } = span;
        if !self.forms.w3c {
            // It is of another trace, or of none.
            headers.remove(&TRACESTATE);
        }
        // What is not written anew must not contradict what is.
        let debug = self.forms.debug && sampled;
        headers.remove(if debug { &B3_SAMPLED } else { &B3_FLAGS });
        if self.parent.is_none() {
            headers.remove(&B3_PARENT);
        }
        let mut put = |name: &HeaderName, text: String| {
            // Hexadecimal digits and dashes are fit for a header.
            if let Ok(value) = HeaderValue::try_from(text) {
                headers.insert(name.clone(), value);
            }
        };
        put(&TRACEPARENT, format!("00-{trace:032x}-{span:016x}-{:02x}", self.flags | u8::from(sampled)));
        let id = || if self.forms.short && trace >> 64 == 0 { format!("{trace:016x}") } else { format!("{trace:032x}") };
        let decision = if debug { "d" } else { ["0", "1"][usize::from(sampled)] };
        let parent = self.parent.map(|p| format!("{:016x}", p.span));
        if self.forms.single {
            let parent = parent.as_ref().map(|p| format!("-{p}")).unwrap_or_default();
            put(&B3, format!("{}-{span:016x}-{decision}{parent}", id()));
        }
        if self.forms.multiple {
            put(&B3_TRACE, id());
            put(&B3_SPAN, format!("{span:016x}"));
            if let Some(parent) = parent {
                put(&B3_PARENT, parent);
            }
            // Debug says itself that it is sampled.
            if !debug {
                put(&B3_SAMPLED, decision.to_owned());
            }
        }
    }
}

/// Makes what headers say of a trace say that no spans are to be written.
pub fn unsampled(headers: &mut HeaderMap) {
    let context = Context::of(headers);
    if let Some(parent) = context.parent {
        Context { parent: None, ..context }.write(parent, false, headers);
    }
}

/// Has a request that is caused by another say of the trace what that says, unless it does.
pub fn copy(from: &HeaderMap, to: &mut HeaderMap) {
    for name in [&TRACEPARENT, &TRACESTATE, &B3, &B3_TRACE, &B3_SPAN, &B3_PARENT, &B3_SAMPLED, &B3_FLAGS] {
        if let Some(value) = from.get(name).filter(|_| !to.contains_key(name)) {
            to.insert(name.clone(), value.clone());
        }
    }
}

fn traceparent(text: &str) -> Option<Context> {
    let mut parts = text.trim().split('-');
    let [version, trace, span, flags] = [(); 4].map(|()| parts.next().unwrap_or_default());
    let lower = |text: &str, length: usize| {
        (text.len() == length && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))).then_some(())
    };
    lower(version, 2)?;
    lower(trace, 32)?;
    lower(span, 16)?;
    lower(flags, 2)?;
    // Later versions may append something; this one may not.
    if version == "ff" || version == "00" && parts.next().is_some() {
        return None;
    }
    let parent = parent(trace, span)?;
    let flags = u8::from_str_radix(flags, 16).ok()?;
    Some(Context { parent: Some(parent), sampled: Some(flags & 1 == 1), flags: flags & HANDED_ON, ..Context::default() })
}

fn parent(trace: &str, span: &str) -> Option<Parent> {
    let hex = |text: &str| text.bytes().all(|b| b.is_ascii_hexdigit());
    if !matches!(trace.len(), 16 | 32) || span.len() != 16 || !hex(trace) || !hex(span) {
        return None;
    }
    let (trace, span) = (u128::from_str_radix(trace, 16).ok()?, u64::from_str_radix(span, 16).ok()?);
    (trace != 0 && span != 0).then_some(Parent { trace, span })
}

/// What B3 says of sampling, and whether it is debug.
fn decision(text: &str) -> Option<(bool, bool)> {
    match text {
        "1" | "true" => Some((true, false)),
        "0" | "false" => Some((false, false)),
        "d" => Some((true, true)),
        _ => None,
    }
}

fn single(text: &str) -> Option<Context> {
    let text = text.trim();
    if let Some((sampled, debug)) = decision(text) {
        return Some(Context { sampled: Some(sampled), forms: Forms { debug, ..Forms::default() }, ..Context::default() });
    }
    let mut parts = text.split('-');
    let (trace, span) = (parts.next()?, parts.next()?);
    let decided = parts.next().and_then(decision);
    let forms = Forms { short: trace.len() == 16, debug: decided.is_some_and(|d| d.1), ..Forms::default() };
    Some(Context { parent: Some(parent(trace, span)?), sampled: decided.map(|d| d.0), forms, flags: 0 })
}

fn multiple<'h>(text: impl Fn(&HeaderName) -> Option<&'h str>) -> Option<Context> {
    let debug = text(&B3_FLAGS) == Some("1");
    let sampled = if debug { Some(true) } else { text(&B3_SAMPLED).and_then(decision).map(|d| d.0) };
    let trace = text(&B3_TRACE);
    let parent = trace.zip(text(&B3_SPAN)).and_then(|(trace, span)| parent(trace, span));
    let forms = Forms { short: trace.is_some_and(|t| t.len() == 16), debug, ..Forms::default() };
    (parent.is_some() || sampled.is_some()).then_some(Context { parent, sampled, forms, flags: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: u128 = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;
    const SPAN: u64 = 0x00f0_67aa_0ba9_02b7;

    type Pairs<'p> = &'p [(&'static str, &'p str)];

    fn headers(pairs: Pairs<'_>) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).expect("a value"))).collect()
    }

    #[test]
    fn contexts_are_read_in_every_form() {
        let (long, short) = ("4bf92f3577b34da6a3ce929d0e0e4736", "a3ce929d0e0e4736");
        let span = "00f067aa0ba902b7";
        let (w3c, b3) = (format!("00-{long}-{span}-01"), format!("{long}-{span}-1-05e3ac9a4f6e3b90"));
        let cases: &[(Pairs<'_>, Option<u128>, Option<bool>)] = &[
            (&[], None, None),
            (&[("traceparent", &w3c)], Some(TRACE), Some(true)),
            (&[("traceparent", &w3c.replace("-01", "-00"))], Some(TRACE), Some(false)),
            (&[("traceparent", &w3c.replace("-01", "-03"))], Some(TRACE), Some(true)),
            (&[("traceparent", &w3c.replace("00-", "cc-")), ("b3", "0")], Some(TRACE), Some(true)),
            (&[("traceparent", &format!("cc{}-what-else", &w3c[2..]))], Some(TRACE), Some(true)),
            (&[("traceparent", &format!("{w3c}-else"))], None, None),
            (&[("traceparent", &format!("ff{}", &w3c[2..]))], None, None),
            (&[("traceparent", &w3c.to_uppercase())], None, None),
            (&[("traceparent", &format!("00-{}-{span}-01", "0".repeat(32)))], None, None),
            (&[("traceparent", &format!("00-{long}-{}-01", "0".repeat(16)))], None, None),
            (&[("traceparent", "")], None, None),
            (&[("b3", &b3)], Some(TRACE), Some(true)),
            (&[("b3", &format!("{long}-{span}"))], Some(TRACE), None),
            (&[("b3", &format!("{short}-{span}-0"))], Some(TRACE & u128::from(u64::MAX)), Some(false)),
            (&[("b3", &format!("{long}-{span}-d"))], Some(TRACE), Some(true)),
            (&[("b3", "0")], None, Some(false)),
            (&[("b3", "d")], None, Some(true)),
            (&[("b3", "x-y")], None, None),
            (&[("x-b3-traceid", long), ("x-b3-spanid", span), ("x-b3-sampled", "1")], Some(TRACE), Some(true)),
            (&[("x-b3-traceid", long), ("x-b3-spanid", span)], Some(TRACE), None),
            (&[("x-b3-traceid", long), ("x-b3-spanid", span), ("x-b3-flags", "1")], Some(TRACE), Some(true)),
            (&[("x-b3-traceid", long)], None, None),
            (&[("x-b3-sampled", "0")], None, Some(false)),
        ];
        for (given, trace, sampled) in cases {
            let context = Context::of(&headers(given));
            assert_eq!((context.parent.map(|p| p.trace), context.sampled), (*trace, *sampled), "{given:?}");
            assert!(context.parent.is_none_or(|p| p.span == SPAN), "{given:?}");
            assert_eq!(context.is_given(), trace.is_some() || sampled.is_some());
        }
    }

    #[test]
    fn a_trace_goes_on_in_the_forms_it_came_in() {
        let (long, short) = ("4bf92f3577b34da6a3ce929d0e0e4736", "a3ce929d0e0e4736");
        let (old, new) = ("00f067aa0ba902b7", 0x0102_0304_0506_0708_u64);
        let w3c = format!("00-{long}-0102030405060708-01");
        let cases: &[(Pairs<'_>, Pairs<'_>)] = &[
            (&[("traceparent", &format!("00-{long}-{old}-01"))], &[("traceparent", &w3c)]),
            (&[("b3", &format!("{long}-{old}-1"))], &[("traceparent", &w3c), ("b3", &format!("{long}-0102030405060708-1-{old}"))]),
            (
                &[("b3", &format!("{short}-{old}-d-05e3ac9a4f6e3b90"))],
                &[("traceparent", &format!("00-{short:0>32}-0102030405060708-01")), ("b3", &format!("{short}-0102030405060708-d-{old}"))],
            ),
            (
                &[("x-b3-traceid", long), ("x-b3-spanid", old), ("x-b3-sampled", "1"), ("tracestate", "a=b")],
                &[
                    ("x-b3-traceid", long),
                    ("x-b3-spanid", "0102030405060708"),
                    ("x-b3-sampled", "1"),
                    ("traceparent", &w3c),
                    ("x-b3-parentspanid", old),
                ],
            ),
        ];
        let random = (format!("00-{long}-{old}-03"), format!("00-{long}-0102030405060708-03"));
        let more: &[(Pairs<'_>, Pairs<'_>)] = &[
            (&[("traceparent", &random.0), ("tracestate", "a=b")], &[("traceparent", &random.1), ("tracestate", "a=b")]),
            (
                &[("x-b3-traceid", long), ("x-b3-spanid", old), ("x-b3-sampled", "0"), ("x-b3-flags", "1")],
                &[
                    ("x-b3-traceid", long),
                    ("x-b3-spanid", "0102030405060708"),
                    ("x-b3-flags", "1"),
                    ("traceparent", &w3c),
                    ("x-b3-parentspanid", old),
                ],
            ),
        ];
        for (given, expected) in cases.iter().chain(more) {
            let mut went = headers(given);
            let context = Context::of(&went);
            let trace = context.parent.expect("a parent").trace;
            context.write(Parent { trace, span: new }, true, &mut went);
            assert_eq!(went, headers(expected), "{given:?}");
        }
    }

    #[test]
    fn a_new_trace_has_nothing_of_an_old_one() {
        let new = Parent { trace: 7, span: 9 };
        let two = [("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), ("tracestate", "a=b")];
        let mut twice = headers(&two);
        twice.append("traceparent", HeaderValue::from_static("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b8-01"));
        for mut given in [headers(&[("traceparent", "garbage"), ("tracestate", "a=b"), ("x-b3-parentspanid", "00f067aa0ba902b7")]), twice] {
            let context = Context::of(&given);
            assert!(!context.is_given() && context.state(&given).is_empty());
            context.write(new, true, &mut given);
            assert_eq!(given, headers(&[("traceparent", "00-00000000000000000000000000000007-0000000000000009-01")]));
        }
        assert_eq!(Context::of(&headers(&two)).state(&headers(&two)), "a=b");
    }

    #[test]
    fn a_copy_is_not_traced() {
        let long = "4bf92f3577b34da6a3ce929d0e0e4736";
        let mut copy =
            headers(&[("traceparent", &format!("00-{long}-00f067aa0ba902b7-01")), ("b3", &format!("{long}-00f067aa0ba902b7-d"))]);
        unsampled(&mut copy);
        let expected = [("traceparent", &*format!("00-{long}-00f067aa0ba902b7-00")), ("b3", &*format!("{long}-00f067aa0ba902b7-0"))];
        assert_eq!(copy, headers(&expected));
        let mut multiple = headers(&[("x-b3-traceid", long), ("x-b3-spanid", "00f067aa0ba902b7"), ("x-b3-flags", "1")]);
        unsampled(&mut multiple);
        assert!(multiple.get("x-b3-flags").is_none() && multiple["x-b3-sampled"] == "0", "{multiple:?}");
        let mut none = HeaderMap::new();
        unsampled(&mut none);
        assert!(none.is_empty());
    }
}
