//! `pipe:` commands of older webdataset scripts: the shard's URL is read out of the command, which is never run.
//!
//! An option that could change what is read is refused by its name; an option that changes only messages or speed is
//! left out. Messages never contain the value of an option: it may be a secret.

mod programs;

use std::borrow::Cow;

use self::programs::{Program, program};
use super::url::{UrlError, invalid};

/// Extracts the URL from `pipe:aws s3 cp URL -` and similar commands. Other text is returned unchanged.
pub(super) fn unwrap_pipe(text: &str) -> Result<Cow<'_, str>, UrlError> {
    let Some(command) = text.strip_prefix("pipe:") else {
        return Ok(Cow::Borrowed(text));
    };
    url_of(command)
        .map(Cow::Owned)
        .map_err(|reason| invalid(text, reason))
}

fn url_of(command: &str) -> Result<String, String> {
    let words = words(command)?;
    let Some((first, rest)) = words.split_first() else {
        return Err("has no command; give the shard's URL alone".to_owned());
    };
    if let Some((variable, _)) = first.split_once('=') {
        return Err(format!(
            "{variable}= in front of the command is not taken over: set it in coffey's own environment, and give the URL alone"
        ));
    }
    let name = first.rsplit('/').next().unwrap_or(first);
    let program = program(name).ok_or_else(|| {
        format!(
            "commands are not run, and {name} is not one whose URL is read out (aws s3 cp, s5cmd cat, curl, wget, gsutil, gcloud \
             storage, cat): give the shard's URL alone, or pipe the command into coffey and name '-', standard input"
        )
    })?;
    let arguments = program.arguments(name, rest)?;
    program.url(name, &arguments)
}

impl Program {
    /// The words that are no options.
    fn arguments(&self, name: &str, words: &[String]) -> Result<Vec<String>, String> {
        let mut found = Vec::new();
        let mut output = None;
        let mut words = words.iter();
        while let Some(word) = words.next() {
            if word == "--" {
                found.extend(words.by_ref().cloned());
            } else if self.flags.contains(&word.as_str()) {
            } else if let Some(long) = word.strip_prefix("--") {
                let (option, attached) = match long.split_once('=') {
                    Some((option, value)) => (format!("--{option}"), Some(value.to_owned())),
                    None => (word.clone(), None),
                };
                let mut value = || attached.clone().or_else(|| words.next().cloned());
                if self.output.contains(&option.as_str()) {
                    output = Some(value().unwrap_or_default());
                } else if self.values.contains(&option.as_str()) {
                    value();
                } else {
                    return Err(self.refuse(name, &option));
                }
            } else if word.len() > 1 && word.starts_with('-') {
                for (at, letter) in word.char_indices().skip(1) {
                    let option = format!("-{letter}");
                    let attached = &word[at + letter.len_utf8()..];
                    let mut value = || match attached {
                        "" => words.next().cloned().unwrap_or_default(),
                        attached => attached.to_owned(),
                    };
                    if self.output.contains(&option.as_str()) {
                        output = Some(value());
                        break;
                    } else if self.values.contains(&option.as_str()) {
                        value();
                        break;
                    } else if !self.flags.contains(&option.as_str()) {
                        return Err(self.refuse(name, &option));
                    }
                }
            } else {
                found.push(word.clone());
            }
        }
        match output.as_deref() {
            Some("-" | "/dev/stdout") => Ok(found),
            None if !self.needs_output => Ok(found),
            Some(_) => Err(format!(
                "the option {} of {name} names a file: a shard is read, not written; give the URL alone",
                self.output[0]
            )),
            None => Err(format!(
                "{name} without {} - writes to a file: a shard is read, not written; give the URL alone",
                self.output[0]
            )),
        }
    }

    fn refuse(&self, name: &str, option: &str) -> String {
        let known = self
            .refused
            .iter()
            .find(|(options, _)| options.contains(&option));
        match known {
            Some((_, remedy)) => format!(
                "the option {option} of {name} is not taken over from the command ({remedy}): give the URL alone"
            ),
            None => format!(
                "the option {option} of {name} is not known here and might change what is read: give the URL alone"
            ),
        }
    }

    /// The URL among the words that are no options.
    fn url(&self, name: &str, arguments: &[String]) -> Result<String, String> {
        let usage = || {
            let commands = self.commands.iter().map(|words| {
                let words: Vec<_> = [name].iter().chain(*words).copied().collect();
                format!("{} URL", words.join(" "))
            });
            let commands = commands.collect::<Vec<_>>().join(" or ");
            format!("is not {commands} to standard output: give the shard's URL alone")
        };
        let found = self.commands.iter().find_map(|command| {
            let starts = arguments.iter().zip(*command).filter(|(a, b)| a == *b);
            (starts.count() == command.len()).then(|| (command, &arguments[command.len()..]))
        });
        let (command, rest) = found.ok_or_else(usage)?;
        let url = match rest {
            [url] if !(self.names_output)(command.last().unwrap_or(&"")) => url,
            [url, output]
                if (self.names_output)(command.last().unwrap_or(&""))
                    && ["-", "/dev/stdout"].contains(&output.as_str()) =>
            {
                url
            }
            _ => return Err(usage()),
        };
        let fits = match self.schemes {
            [] => !url.contains("://") && !url.starts_with(['@', '-']) && !url.starts_with("pipe:"),
            schemes => schemes.iter().any(|scheme| url.starts_with(scheme)),
        };
        if fits {
            Ok(url.trim().to_owned())
        } else {
            Err(usage())
        }
    }
}

/// The words of a command as a shell separates them.
///
/// # Errors
/// The first construct of the command that needs a shell.
fn words(command: &str) -> Result<Vec<String>, String> {
    let mut command = command.trim();
    // Only a failure or a message is discarded by these.
    while let Some(rest) = [
        "|| true",
        "|| :",
        "|| exit 0",
        "2>/dev/null",
        "2> /dev/null",
    ]
    .iter()
    .find_map(|end| command.strip_suffix(end))
    {
        command = rest.trim_end();
    }
    let mut found = Vec::new();
    let mut word: Option<String> = None;
    let mut letters = command.chars().peekable();
    let mut quote = None;
    while let Some(letter) = letters.next() {
        match (quote, letter) {
            (Some(open), letter) if letter == open => quote = None,
            (Some('\''), letter) => word.get_or_insert_default().push(letter),
            (None, '\'' | '"') => {
                word.get_or_insert_default();
                quote = Some(letter);
            }
            (_, '\\') => word.get_or_insert_default().extend(letters.next()),
            (_, '$' | '`') => {
                return Err(
                    "has a variable or a command for the shell, and no shell is run: write its value, and give the URL alone"
                        .to_owned(),
                );
            }
            (None, '|' | '&' | ';' | '<' | '>' | '(' | ')' | '\n') => {
                return Err(format!(
                    "has {letter:?} for the shell, and no shell is run: give the URL alone (gzip is detected by content)"
                ));
            }
            (None, letter) if letter.is_whitespace() => found.extend(word.take()),
            (_, letter) => word.get_or_insert_default().push(letter),
        }
    }
    if quote.is_some() {
        return Err("has a quote without its end".to_owned());
    }
    found.extend(word);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(command: &str) -> String {
        unwrap_pipe(&format!("pipe:{command}"))
            .unwrap()
            .into_owned()
    }

    fn refused(command: &str) -> String {
        unwrap_pipe(&format!("pipe:{command}"))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn pipe_url_is_read_out() {
        for (command, expected) in [
            ("aws s3 cp s3://b/{0..1}.tar -", "s3://b/{0..1}.tar"),
            ("aws s3 cp --quiet s3://b/0.tar - || true", "s3://b/0.tar"),
            (
                "aws --cli-read-timeout=0 s3 cp 's3://b/a b.tar' /dev/stdout",
                "s3://b/a b.tar",
            ),
            (
                "/usr/bin/curl -sSL --retry 3 \"https://h/a?x=1&y=2\"",
                "https://h/a?x=1&y=2",
            ),
            (
                "curl -sfLm60 https://h/a.tar -o - 2>/dev/null",
                "https://h/a.tar",
            ),
            ("curl -o- https://h/a.tar", "https://h/a.tar"),
            ("wget -qO- https://h/a.tar", "https://h/a.tar"),
            ("wget -q -O - --tries=3 https://h/a.tar", "https://h/a.tar"),
            (
                "wget --output-document=- https://h/a.tar",
                "https://h/a.tar",
            ),
            ("s5cmd cat s3://b/0.tar", "s3://b/0.tar"),
            ("gsutil -q cat gs://b/0.tar", "gs://b/0.tar"),
            ("gsutil cp gs://b/0.tar -", "gs://b/0.tar"),
            ("gcloud storage cat gs://b/0.tar", "gs://b/0.tar"),
            (
                "cat /data/my\\ shards/{0..1}.tar",
                "/data/my shards/{0..1}.tar",
            ),
        ] {
            assert_eq!(url(command), expected, "{command}");
        }
        assert_eq!(unwrap_pipe("a.tar").unwrap(), "a.tar");
    }

    #[test]
    fn pipe_options_that_change_the_bytes_are_refused_by_name() {
        for (command, names) in [
            (
                "curl -s -L https://h/a -H 'Authorization:Bearer hf_test'",
                ["-H", "data.http_headers"],
            ),
            ("curl -sH'Authorization: x' https://h/a", ["-H", "HF_TOKEN"]),
            (
                "curl --header x https://h/a",
                ["--header", "data.http_headers"],
            ),
            ("curl -u me:pw https://h/a", ["-u", "Authorization"]),
            ("curl -sr 0-99 https://h/a", ["-r", "whole"]),
            (
                "curl -x http://proxy:3128 https://h/a",
                ["-x", "HTTPS_PROXY"],
            ),
            ("curl -k https://h/a", ["-k", "ca_bundle"]),
            ("curl -o x.tar https://h/a", ["-o", "URL alone"]),
            ("curl --foo https://h/a", ["--foo", "not known"]),
            ("wget https://h/a", ["-O -", "URL alone"]),
            (
                "wget -qO- --header=x https://h/a",
                ["--header", "data.http_headers"],
            ),
            (
                "aws s3 cp s3://b/k - --profile p",
                ["--profile", "AWS_PROFILE"],
            ),
            (
                "aws s3 cp s3://b/k - --no-sign-request",
                ["--no-sign-request", "anonymous"],
            ),
            (
                "aws --region=x s3 cp s3://b/k -",
                ["--region", "[s3] region"],
            ),
            (
                "aws s3 cp --request-payer requester s3://b/k -",
                ["--request-payer", "requester_pays"],
            ),
            (
                "aws s3 cp --endpoint-url=https://m s3://b/k -",
                ["--endpoint-url", "[s3] endpoint_url"],
            ),
            (
                "s5cmd --endpoint-url https://m cat s3://b/k",
                ["--endpoint-url", "[s3] endpoint_url"],
            ),
            (
                "AWS_PROFILE=p aws s3 cp s3://b/k -",
                ["AWS_PROFILE=", "environment"],
            ),
            ("gsutil cat -r 0-9 gs://b/k", ["-r", "whole"]),
            (
                "aws s3 cp s3://b/k k.tar",
                ["aws s3 cp URL", "standard output"],
            ),
            ("aws s3 sync s3://b/k -", ["aws s3 cp URL", "URL alone"]),
            ("curl https://h/a https://h/b", ["curl URL", "URL alone"]),
            ("cat a.tar b.tar", ["cat URL", "URL alone"]),
            ("cat s3://b/k", ["cat URL", "URL alone"]),
            ("curl -s https://h/a | gunzip", ["'|'", "no shell"]),
            ("curl -s https://h/$NAME", ["variable", "no shell"]),
            ("curl 'https://h/a", ["quote", "end"]),
            ("ssh host cat a.tar", ["commands are not run", "ssh"]),
            ("", ["no command", "alone"]),
        ] {
            let text = refused(command);
            for name in names {
                assert!(text.contains(name), "{command}: {text}");
            }
        }
    }

    #[test]
    fn pipe_errors_hide_the_values_of_options() {
        for command in [
            "curl -H 'Authorization: Bearer s3cret' https://h/a",
            "curl -us3cret https://h/a",
            "curl --header='s3cret' https://h/a",
            "curl https://u:s3cret@h/a?s3cret -O",
            "wget -qO- --password s3cret https://h/a",
            "TOKEN=s3cret curl https://h/a",
            "curl -H 'x: s3cret",
        ] {
            let text = refused(command);
            assert!(!text.contains("s3cret"), "{text}");
        }
    }
}
