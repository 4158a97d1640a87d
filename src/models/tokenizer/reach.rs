//! How much of a text its first ids depend on. Tokenizing takes about a hundred bytes of memory for each byte of the text.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use tokenizers::AddedToken;

use super::END_OF_WORD;
use super::vocabulary::Vocabulary;

/// Most characters that NFC composes to one.
const COMPOSED: usize = 4;
/// Characters before the end of a text that may be split into words in another way if the text goes on: a contraction's.
const CONTRACTION: usize = 3;

/// The part of a text that its first ids depend on.
#[derive(Debug)]
pub(super) struct Reach {
    /// Characters that are not whitespace; `None`: the whole text.
    chars: Option<usize>,
    /// Characters at both ends of a run of whitespace; `None`: the whole run.
    whitespace: Option<usize>,
}

impl Reach {
    /// The reach of the first `ids` ids.
    pub(super) fn new(vocabulary: &Vocabulary, added: &[AddedToken], ids: usize) -> Self {
        let chars = |text: &str| text.chars().count();
        let longest_added = added.iter().map(|token| token.content.len()).max();
        let longest_added = longest_added.unwrap_or(0);
        // A character of a token in the vocabulary stands for a byte.
        let tokens = vocabulary.ids.keys().map(|token| chars(token));
        let longest = tokens.max().unwrap_or(0).max(longest_added);
        let reach = drift(&vocabulary.merges)
            .map(|drift| ids * longest + drift + longest_added + CONTRACTION + 1);
        let is_blank = |token: &AddedToken| token.content.trim().is_empty();
        Self {
            // Twice as many: a cut inside a run of combining marks changes the order of its marks.
            chars: reach.map(|bytes| 2 * COMPOSED * bytes),
            whitespace: (!added.iter().any(is_blank)).then_some(longest_added + 1),
        }
    }

    /// The whole text.
    #[cfg(test)]
    pub(super) fn whole() -> Self {
        Self {
            chars: None,
            whitespace: None,
        }
    }

    /// The beginning of a text that has the same first ids, and more ids than those if the text has; long runs of whitespace are
    /// shortened.
    pub(super) fn cut<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let Some(most) = self.chars.filter(|&most| text.len() > most) else {
            return Cow::Borrowed(text);
        };
        let mut kept = String::new();
        let mut count = 0;
        let mut run = 0;
        for (at, char) in text.char_indices() {
            if char.is_whitespace() {
                continue;
            }
            self.push_whitespace(&mut kept, &text[run..at]);
            if count == most {
                return Cow::Owned(kept);
            }
            kept.push(char);
            count += 1;
            run = at + char.len_utf8();
        }
        self.push_whitespace(&mut kept, &text[run..]);
        Cow::Owned(kept)
    }

    fn push_whitespace(&self, kept: &mut String, run: &str) {
        let ends = self.whitespace.and_then(|ends| {
            let first = run.char_indices().nth(ends)?.0;
            let last = run.char_indices().rev().nth(ends)?.0;
            (first < last).then_some((first, last))
        });
        match ends {
            Some((first, last)) => {
                kept.push_str(&run[..first]);
                kept.push_str(&run[last..]);
            }
            None => kept.push_str(run),
        }
    }
}

/// How many bytes before the end of a word its tokens may depend on what follows, if it is the beginning of a longer word. `None`
/// if the merges are in no order that byte pair encoding learns.
///
/// Merges are applied in the order of their rank, each from left to right. Two words with the same beginning have the same tokens
/// up to some place. A merge moves the place only if its left part is the last token before it, and by the length of that part;
/// the right part of the next merge that moves it begins with this token.
fn drift(merges: &[(String, String)]) -> Option<usize> {
    let (mut made, mut pairs) = (HashSet::new(), HashSet::new());
    // The drift of the merges so far that end with this left part.
    let mut longest: HashMap<&str, usize> = HashMap::new();
    let mut most = 0;
    for (left, right) in merges {
        let single = |token: &str| {
            let token = token.strip_suffix(END_OF_WORD).unwrap_or(token);
            token.chars().nth(1).is_none()
        };
        let unknown = |token: &&String| !single(token) && !made.contains(token.as_str());
        // A merge that is listed twice has the later rank.
        if [left, right].iter().any(unknown) || !pairs.insert((left, right)) {
            return None;
        }
        made.insert(format!("{left}{right}"));
        let ends = right.char_indices().map(|(at, char)| at + char.len_utf8());
        let before = ends.filter_map(|end| longest.get(&right[..end])).max();
        let drift = left.chars().count() + before.copied().unwrap_or(0);
        most = most.max(drift);
        let known = longest.entry(left).or_default();
        *known = drift.max(*known);
    }
    Some(most)
}
