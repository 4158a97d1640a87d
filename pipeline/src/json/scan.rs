//! The grammar of Python's `json.loads`, without recursion.

use super::{JsonError, MAX_DEPTH, MAX_STRICT_DEPTH, Member, Place};

/// Most digits of a whole number: Python's limit for `int`.
const MAX_DIGITS: usize = 4300;

/// How a document is written again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// As it is.
    Verbatim,
    /// As the standard allows: a number that is not finite in f64 becomes a string, a lone surrogate `U+FFFD`.
    Strict,
}

/// A document without spaces.
pub(super) struct Scanned {
    pub(super) text: String,
    /// Of the outermost object, in order; empty if the document is something else.
    pub(super) members: Vec<Member>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Container {
    List,
    Object,
}

struct Scanner<'a> {
    points: &'a [u32],
    at: usize,
    style: Style,
    text: String,
    /// Containers that are not closed yet, outermost first.
    open: Vec<Container>,
    members: Vec<Member>,
}

/// Reads a document of code points.
pub(super) fn scan(points: &[u32], style: Style) -> Result<Scanned, JsonError> {
    let mut scanner = Scanner {
        points,
        at: 0,
        style,
        text: String::with_capacity(points.len()),
        open: Vec::new(),
        members: Vec::new(),
    };
    scanner.document()?;
    Ok(Scanned {
        text: scanner.text,
        members: scanner.members,
    })
}

fn is_surrogate(point: u32) -> bool {
    (0xD800..0xE000).contains(&point)
}

fn is_high(point: u32) -> bool {
    (0xD800..0xDC00).contains(&point)
}

fn is_low(point: u32) -> bool {
    (0xDC00..0xE000).contains(&point)
}

impl Scanner<'_> {
    fn document(&mut self) -> Result<(), JsonError> {
        loop {
            self.value()?;
            // A value has begun: a container waits for its first element, anything else is complete.
            if self.opened()? {
                continue;
            }
            if !self.next_element()? {
                break;
            }
        }
        self.skip_space();
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(self.fault("has more text after its end")),
        }
    }

    /// Reads a scalar, or the opening bracket of a container.
    fn value(&mut self) -> Result<(), JsonError> {
        self.skip_space();
        match self.peek_ascii() {
            Some('{') => self.begin(Container::Object, '{'),
            Some('[') => self.begin(Container::List, '['),
            Some('"') => self.string(),
            Some('-' | '0'..='9') => self.number(),
            _ => self.word(),
        }
    }

    fn begin(&mut self, container: Container, bracket: char) -> Result<(), JsonError> {
        let most = match self.style {
            Style::Verbatim => MAX_DEPTH,
            Style::Strict => MAX_STRICT_DEPTH,
        };
        if self.open.len() == most {
            return Err(self.fault(&format!("is nested more than {most} levels deep")));
        }
        self.open.push(container);
        self.at += 1;
        self.text.push(bracket);
        Ok(())
    }

    /// Whether the last token opened a container that is not empty. Reads the key of an object's first element, or the closing
    /// bracket of an empty container.
    fn opened(&mut self) -> Result<bool, JsonError> {
        let (container, closing) = match self.text.as_bytes().last() {
            Some(b'{') => (Container::Object, '}'),
            Some(b'[') => (Container::List, ']'),
            _ => return Ok(false),
        };
        self.skip_space();
        if self.peek_ascii() == Some(closing) {
            self.end(closing);
            return Ok(false);
        }
        if container == Container::Object {
            self.key()?;
        }
        Ok(true)
    }

    fn end(&mut self, bracket: char) {
        self.at += 1;
        self.text.push(bracket);
        self.open.pop();
    }

    /// After a complete value: closes the containers that end here. Whether another value follows; its comma and its key have been read.
    fn next_element(&mut self) -> Result<bool, JsonError> {
        while let Some(container) = self.open.last().copied() {
            if let ([Container::Object], Some(member)) =
                (self.open.as_slice(), self.members.last_mut())
            {
                member.value.end = self.text.len();
            }
            self.skip_space();
            let closing = match container {
                Container::List => ']',
                Container::Object => '}',
            };
            match self.peek_ascii() {
                Some(found) if found == closing => self.end(closing),
                Some(',') => {
                    self.at += 1;
                    self.text.push(',');
                    if container == Container::Object {
                        self.key()?;
                    }
                    return Ok(true);
                }
                _ => return Err(self.fault(&format!("expected `,` or `{closing}`"))),
            }
        }
        Ok(false)
    }

    /// Reads a key and its colon.
    fn key(&mut self) -> Result<(), JsonError> {
        self.skip_space();
        if self.peek_ascii() != Some('"') {
            return Err(self.fault("expected a key in double quotes"));
        }
        let start = self.text.len();
        self.string()?;
        let key = start..self.text.len();
        self.skip_space();
        if self.peek_ascii() != Some(':') {
            return Err(self.fault("expected `:`"));
        }
        self.at += 1;
        self.text.push(':');
        if self.open.len() == 1 {
            let value = self.text.len()..self.text.len();
            self.members.push(Member { key, value });
        }
        Ok(())
    }

    fn word(&mut self) -> Result<(), JsonError> {
        for word in ["null", "true", "false", "NaN", "Infinity"] {
            if self.follows(word) {
                self.take_number_or_word(word.len());
                return Ok(());
            }
        }
        Err(self.fault("expected a value"))
    }

    fn number(&mut self) -> Result<(), JsonError> {
        if self.follows("-Infinity") {
            self.take_number_or_word("-Infinity".len());
            return Ok(());
        }
        let digits_from = |from: usize| {
            let is_digit = |point: &&u32| matches!(char::from_u32(**point), Some('0'..='9'));
            self.points[from.min(self.points.len())..]
                .iter()
                .take_while(is_digit)
                .count()
        };
        let point = |at: usize| self.points.get(at).copied().and_then(char::from_u32);
        let first = self.at + usize::from(point(self.at) == Some('-'));
        let whole = match point(first) {
            Some('0') => 1,
            _ => digits_from(first),
        };
        if whole == 0 {
            return Err(self.fault("expected a value"));
        }
        let mut end = first + whole;
        if point(end) == Some('.') && digits_from(end + 1) > 0 {
            end += 1 + digits_from(end + 1);
        }
        if let Some('e' | 'E') = point(end) {
            let sign = usize::from(matches!(point(end + 1), Some('+' | '-')));
            match digits_from(end + 1 + sign) {
                0 => {}
                digits => end += 1 + sign + digits,
            }
        }
        if end == first + whole && whole > MAX_DIGITS {
            return Err(self.fault(&format!(
                "has a whole number of {whole} digits, more than Python's {MAX_DIGITS},"
            )));
        }
        self.take_number_or_word(end - self.at);
        Ok(())
    }

    /// Takes a token of ASCII characters.
    fn take_number_or_word(&mut self, length: usize) {
        let points = &self.points[self.at..self.at + length];
        let token: String = points.iter().filter_map(|&p| char::from_u32(p)).collect();
        self.at += length;
        let is_finite = match token.as_str() {
            "null" | "true" | "false" => true,
            number => number.parse().is_ok_and(f64::is_finite),
        };
        if self.style == Style::Strict && !is_finite {
            self.text.extend(['"', '"']);
            self.text.insert_str(self.text.len() - 1, &token);
        } else {
            self.text.push_str(&token);
        }
    }

    fn string(&mut self) -> Result<(), JsonError> {
        let start = self.at;
        self.at += 1;
        self.text.push('"');
        loop {
            let Some(point) = self.peek() else {
                self.at = start;
                return Err(self.fault("has a string without an end"));
            };
            match char::from_u32(point) {
                Some('"') => break,
                Some('\\') => self.escape()?,
                Some(control) if control < ' ' => {
                    return Err(self.fault("has a control character in a string"));
                }
                Some(character) => {
                    self.at += 1;
                    self.text.push(character);
                }
                None => {
                    self.at += 1;
                    self.lone_surrogate(point);
                }
            }
        }
        self.at += 1;
        self.text.push('"');
        Ok(())
    }

    fn escape(&mut self) -> Result<(), JsonError> {
        let next = self.points.get(self.at + 1).copied();
        match next.and_then(char::from_u32) {
            Some(short @ ('"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't')) => {
                self.at += 2;
                self.text.extend(['\\', short]);
                Ok(())
            }
            Some('u') => {
                let Some(unit) = self.unicode_escape(self.at) else {
                    return Err(self.fault("has an invalid \\uXXXX escape"));
                };
                let low = self.unicode_escape(self.at + 6).filter(|&low| is_low(low));
                match low {
                    Some(_) if is_high(unit) => self.take_escapes(12),
                    _ if is_surrogate(unit) && self.style == Style::Strict => {
                        self.at += 6;
                        self.lone_surrogate(unit);
                    }
                    _ => self.take_escapes(6),
                }
                Ok(())
            }
            _ => Err(self.fault("has an invalid escape in a string")),
        }
    }

    /// The code unit of the escape `\uXXXX` at `at`.
    fn unicode_escape(&self, at: usize) -> Option<u32> {
        let escape = self.points.get(at..at + 6)?;
        if escape[..2] != [u32::from('\\'), u32::from('u')] {
            return None;
        }
        escape[2..].iter().try_fold(0, |unit, &point| {
            Some(unit << 4 | char::from_u32(point)?.to_digit(16)?)
        })
    }

    fn take_escapes(&mut self, length: usize) {
        let points = &self.points[self.at..self.at + length];
        self.text
            .extend(points.iter().filter_map(|&p| char::from_u32(p)));
        self.at += length;
    }

    fn lone_surrogate(&mut self, unit: u32) {
        match self.style {
            Style::Verbatim => self.text.push_str(&format!("\\u{unit:04x}")),
            Style::Strict => self.text.push(char::REPLACEMENT_CHARACTER),
        }
    }

    fn follows(&self, word: &str) -> bool {
        let points = self.points[self.at..].iter().copied();
        let mut ahead = points.take(word.len());
        word.chars().all(|c| ahead.next() == Some(u32::from(c)))
    }

    fn skip_space(&mut self) {
        while matches!(self.peek_ascii(), Some(' ' | '\t' | '\n' | '\r')) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u32> {
        self.points.get(self.at).copied()
    }

    fn peek_ascii(&self) -> Option<char> {
        self.peek().and_then(char::from_u32)
    }

    /// An error at the current place.
    fn fault(&self, message: &str) -> JsonError {
        let before = &self.points[..self.at.min(self.points.len())];
        let is_newline = |point: &u32| *point == u32::from('\n');
        let line = 1 + before.iter().filter(|point| is_newline(point)).count();
        let column = 1 + before.iter().rev().take_while(|p| !is_newline(p)).count();
        let place = Place::At(line, column);
        if before.len() == self.points.len() {
            return JsonError {
                message: format!("ends early: {message}"),
                place,
            };
        }
        JsonError {
            message: message.to_owned(),
            place,
        }
    }
}
