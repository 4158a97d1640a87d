//! What of a run strangers may read: names without the machine's folders, URLs without secrets.

use toml::{Table, Value};

use crate::config::{Config, ModelPlace, ModelRef};

/// Keys and tables that concern the machine alone.
const PRIVATE: [&str; 13] = [
    "s3",
    "metrics",
    "latents",
    "audit",
    "hub",
    "track",
    "checkpoint",
    "encode",
    "data.cache_dir",
    "data.cache_limit_gb",
    "train.output",
    "train.scratch",
    "train.device",
];

/// The teacher, as strangers can find it.
pub(super) enum Teacher {
    Hub(String),
    /// On no public place; its name alone.
    Elsewhere(String),
}

pub(super) fn place(model: &ModelRef) -> Teacher {
    match model.place() {
        Ok(ModelPlace::Hub(id)) => Teacher::Hub(id),
        _ => {
            let name = model.as_str().trim_end_matches('/').rsplit('/').next();
            Teacher::Elsewhere(name.unwrap_or_default().to_owned())
        }
    }
}

/// The configuration without what concerns the machine.
pub(super) fn public(config: &Config, teacher: &Teacher) -> String {
    let mut table = Table::try_from(config).unwrap_or_default();
    for key in PRIVATE {
        match key.split_once('.') {
            None => drop(table.remove(key)),
            Some((name, key)) => {
                if let Some(Value::Table(inner)) = table.get_mut(name) {
                    inner.remove(key);
                }
            }
        }
    }
    let mut set = |name: &str, key: &str, value: Value| {
        if let Some(Value::Table(inner)) = table.get_mut(name)
            && inner.contains_key(key)
        {
            inner.insert(key.to_owned(), value);
        }
    };
    let shown = |place: &Teacher| match place {
        Teacher::Hub(name) | Teacher::Elsewhere(name) => Value::from(name.as_str()),
    };
    let shards = config
        .data
        .shards
        .iter()
        .map(|s| Value::from(public_url(s)));
    set("data", "shards", Value::Array(shards.collect()));
    set("model", "teacher", shown(teacher));
    if let Some(vae) = &config.model.vae {
        set("model", "vae", shown(&place(vae)));
    }
    toml::to_string(&table).unwrap_or_default()
}

/// A shard's URL or pattern without secrets: no query, no user, no command around it; of a local path the last part alone.
pub(super) fn public_url(shard: &str) -> String {
    let parts = shard.split("::").map(|part| {
        let part = part.trim();
        let urls = ["s3://", "https://", "http://"];
        let Some(start) = urls.iter().filter_map(|scheme| part.find(scheme)).min() else {
            return part.rsplit('/').next().unwrap_or_default().to_owned();
        };
        let end = |c: char| c.is_whitespace() || "?#'\"".contains(c);
        let url = part[start..].split(end).next().unwrap_or_default();
        let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let host = host.rsplit('@').next().unwrap_or_default();
        format!("{scheme}://{host}/{path}")
    });
    parts.collect::<Vec<_>>().join("::")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_keep_their_pattern_and_lose_their_secrets() {
        for (shard, shown) in [
            (
                "s3://bucket/{00000..01210}.tar",
                "s3://bucket/{00000..01210}.tar",
            ),
            ("pipe:aws s3 cp s3://b/{0..3}.tar -", "s3://b/{0..3}.tar"),
            (
                "pipe:curl -H 'token: x' https://u:p@h/a.tar?k=v || true",
                "https://h/a.tar",
            ),
            ("/data/a.tar::https://h/b.tar?x", "a.tar::https://h/b.tar"),
            ("@/lists/shards.txt", "shards.txt"),
            ("-", "-"),
        ] {
            assert_eq!(public_url(shard), shown);
        }
    }
}
