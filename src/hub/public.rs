//! The part of a configuration that a public model card may show: names without local folders, URLs without secrets.

use toml::{Table, Value};

use crate::config::{Config, ModelPlace, ModelRef};

/// Keys and tables that describe the machine.
const PRIVATE: [&str; 14] = [
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
    "data.http_headers",
    "train.output",
    "train.scratch",
    "train.device",
];

/// A model as a public card names it.
pub(super) enum PublicModel {
    /// Id on the Hub.
    Hub(String),
    /// Last part of the path of a model that is not on the Hub.
    Private(String),
}

pub(super) fn public_model(model: &ModelRef) -> PublicModel {
    match model.place() {
        Ok(ModelPlace::Hub(id)) => PublicModel::Hub(id),
        _ => {
            let name = model.as_str().trim_end_matches('/').rsplit('/').next();
            PublicModel::Private(name.unwrap_or_default().to_owned())
        }
    }
}

/// The configuration as TOML, without [`PRIVATE`] keys and with public names and URLs.
pub(super) fn public_config(config: &Config, teacher: &PublicModel) -> String {
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
    let name = |model: &PublicModel| match model {
        PublicModel::Hub(name) | PublicModel::Private(name) => Value::from(name.as_str()),
    };
    let shards = config
        .data
        .shards
        .iter()
        .map(|s| Value::from(public_url(&s.to_string())));
    set("data", "shards", Value::Array(shards.collect()));
    set("model", "teacher", name(teacher));
    if let Some(vae) = &config.model.vae {
        set("model", "vae", name(&public_model(vae)));
    }
    toml::to_string(&table).unwrap_or_default()
}

/// A shard's URL or pattern without query, user and `pipe:` command; only the file name of a local path.
pub(super) fn public_url(shard: &str) -> String {
    let parts = shard.split("::").map(|part| {
        let part = part.trim();
        let urls = ["s3://", "https://", "http://", "hf://"];
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
    fn public_urls_keep_patterns_and_drop_secrets() {
        for (shard, shown) in [
            (
                "s3://bucket/{00000..01210}.tar",
                "s3://bucket/{00000..01210}.tar",
            ),
            ("pipe:aws s3 cp s3://b/{0..3}.tar -", "s3://b/{0..3}.tar"),
            (
                "hf://datasets/u/n@v/{0..3}.tar",
                "hf://datasets/u/n@v/{0..3}.tar",
            ),
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
