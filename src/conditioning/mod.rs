//! From captions and sizes to a [`Conditioning`](crate::models::Conditioning): tokenizers and text encoders of a pipeline, and the size
//! ids of SDXL.

mod size_ids;
mod text_encoder;

pub use size_ids::SizeIds;
pub use text_encoder::{EncodedText, TextEncoder, TextEncoderError, Unconditional};
