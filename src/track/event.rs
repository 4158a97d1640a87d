//! The protocol buffers of an event file, as far as they are used: TensorFlow's `event.proto`, `summary.proto` and
//! `tensor.proto`, with their field numbers.

use std::time::SystemTime;

/// What every file says first: steps are taken from events, and a [`Status::Start`] ends those of an earlier process.
const VERSION: &str = "brain.Event:2";

/// One record.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    pub(super) wall_time: f64,
    #[prost(int64, tag = "2")]
    pub(super) step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    pub(super) what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SessionLog {
    #[prost(enumeration = "Status", tag = "1")]
    pub(super) status: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(super) enum Status {
    Unspecified = 0,
    /// Events of earlier files from this step on don't count any more.
    Start = 1,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Summary {
    #[prost(message, repeated, tag = "1")]
    pub(super) value: Vec<Value>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Value {
    #[prost(string, tag = "1")]
    pub(super) tag: String,
    #[prost(message, optional, tag = "9")]
    pub(super) metadata: Option<Metadata>,
    #[prost(oneof = "Content", tags = "2, 4, 8")]
    pub(super) content: Option<Content>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Content {
    #[prost(float, tag = "2")]
    Scalar(f32),
    #[prost(message, tag = "4")]
    Picture(Picture),
    #[prost(message, tag = "8")]
    Tensor(Tensor),
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Picture {
    #[prost(int32, tag = "1")]
    pub(super) height: i32,
    #[prost(int32, tag = "2")]
    pub(super) width: i32,
    /// 3: RGB.
    #[prost(int32, tag = "3")]
    pub(super) colorspace: i32,
    #[prost(bytes = "vec", tag = "4")]
    pub(super) encoded: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Metadata {
    #[prost(message, optional, tag = "1")]
    pub(super) plugin: Option<Plugin>,
    /// 2: a tensor.
    #[prost(int32, tag = "4")]
    pub(super) data_class: i32,
}

/// Which of TensorBoard's plugins shows a value.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Plugin {
    #[prost(string, tag = "1")]
    pub(super) name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Tensor {
    /// 7: strings.
    #[prost(int32, tag = "1")]
    pub(super) dtype: i32,
    #[prost(message, optional, tag = "2")]
    pub(super) shape: Option<Shape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    pub(super) strings: Vec<Vec<u8>>,
}

/// No dimensions: one value.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Shape {}

impl Event {
    fn new(step: u64, what: What) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self {
            wall_time: now.map_or(0.0, |since| since.as_secs_f64()),
            step: i64::try_from(step).unwrap_or(i64::MAX),
            what: Some(what),
        }
    }

    pub(super) fn version() -> Self {
        Self::new(0, What::FileVersion(VERSION.to_owned()))
    }

    /// A process that makes the steps from `first` on.
    pub(super) fn start(first: u64) -> Self {
        let status = Status::Start.into();
        Self::new(first, What::SessionLog(SessionLog { status }))
    }

    pub(super) fn scalars(step: u64, values: &[(&str, f64)]) -> Self {
        let values = values.iter().map(|(tag, value)| Value {
            tag: (*tag).to_owned(),
            metadata: None,
            content: Some(Content::Scalar(*value as f32)),
        });
        Self::summary(step, values.collect())
    }

    pub(super) fn picture(step: u64, tag: &str, (width, height): (u32, u32), png: Vec<u8>) -> Self {
        let side = |pixels| i32::try_from(pixels).unwrap_or(i32::MAX);
        let picture = Picture {
            height: side(height),
            width: side(width),
            colorspace: 3,
            encoded: png,
        };
        let value = Value {
            tag: tag.to_owned(),
            metadata: None,
            content: Some(Content::Picture(picture)),
        };
        Self::summary(step, vec![value])
    }

    /// `markdown` is shown as such.
    pub(super) fn text(step: u64, tag: &str, markdown: &str) -> Self {
        let tensor = Tensor {
            dtype: 7,
            shape: Some(Shape {}),
            strings: vec![markdown.as_bytes().to_vec()],
        };
        let plugin = Plugin {
            name: "text".to_owned(),
        };
        let value = Value {
            tag: tag.to_owned(),
            metadata: Some(Metadata {
                plugin: Some(plugin),
                data_class: 2,
            }),
            content: Some(Content::Tensor(tensor)),
        };
        Self::summary(step, vec![value])
    }

    fn summary(step: u64, value: Vec<Value>) -> Self {
        Self::new(step, What::Summary(Summary { value }))
    }
}

impl Summary {
    /// Whether it holds the numbers of a step.
    pub(super) fn is_scalars(&self) -> bool {
        let scalar = |value: &Value| matches!(value.content, Some(Content::Scalar(_)));
        self.value.first().is_some_and(scalar)
    }

    /// The tags of the pictures it holds.
    pub(super) fn picture_tags(&self) -> impl Iterator<Item = &str> {
        let picture = |value: &&Value| matches!(value.content, Some(Content::Picture(_)));
        self.value
            .iter()
            .filter(picture)
            .map(|value| value.tag.as_str())
    }
}
