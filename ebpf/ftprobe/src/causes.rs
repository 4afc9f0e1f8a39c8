//! Errors as text, with what caused them: the verifier and the BTF reader say the essential last.

use std::error::Error;

/// The error and its causes, each once.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = inner.source();
    }
    shortened(text)
}

/// The verifier's log can have thousands of lines: its end says what it did not like.
fn shortened(text: String) -> String {
    const BEGIN: usize = 160;
    const END: usize = 400;
    let characters = text.chars().count();
    if characters <= BEGIN + END {
        return text;
    }
    let begin: String = text.chars().take(BEGIN).collect();
    let end: String = text.chars().skip(characters - END).collect();
    format!("{begin} … {end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_follow_and_the_end_of_a_long_one_stays() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] std::io::Error);
        let short = Outer(std::io::Error::other("inner"));
        assert_eq!(with_causes(&short), "outer: inner");
        let long = format!("{}the end", "log ".repeat(5_000));
        let text = with_causes(&Outer(std::io::Error::other(long)));
        assert!(
            text.starts_with("outer: log") && text.ends_with("the end"),
            "{text}"
        );
        assert!(text.len() < 600);
    }
}
