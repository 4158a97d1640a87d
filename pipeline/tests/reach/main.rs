//! Reaching shards wherever they are: with every kind of credentials, over TLS, on standard input, and
//! through the cache. What reads the environment runs in a process of its own ([`child`]).

#[path = "../support/mod.rs"]
mod support;

mod cache;
mod child;
mod credentials;
mod recorder;
mod stdin;
mod tls;
mod web;
