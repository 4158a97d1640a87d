//! From captions to a [`Conditioning`](crate::models::Conditioning): tokenizer and text encoder of a pipeline.
//!
//! A pipeline with a second text encoder, or with size ids, adds them here and nowhere else.

mod text_encoder;

pub use text_encoder::{EncodedText, TextEncoder, TextEncoderError};
