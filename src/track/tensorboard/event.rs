//! The protocol buffers of an event file: the used part of TensorFlow's `event.proto`, `summary.proto` and `tensor.proto`, with
//! their field numbers.

use std::time::SystemTime;

/// First record of every file. From this version on, a [`SessionStatus::Start`] discards later steps of earlier files.
const VERSION: &str = "brain.Event:2";

/// One record.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    pub(super) wall_time: f64,
    #[prost(int64, tag = "2")]
    pub(super) step: i64,
    #[prost(oneof = "EventData", tags = "3, 5, 7")]
    pub(super) data: Option<EventData>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum EventData {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SessionLog {
    #[prost(enumeration = "SessionStatus", tag = "1")]
    pub(super) status: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(super) enum SessionStatus {
    Unspecified = 0,
    /// Readers discard events of earlier files from this step on.
    Start = 1,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Summary {
    #[prost(message, repeated, tag = "1")]
    pub(super) value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SummaryValue {
    #[prost(string, tag = "1")]
    pub(super) tag: String,
    #[prost(message, optional, tag = "9")]
    pub(super) metadata: Option<SummaryMetadata>,
    #[prost(oneof = "ValueData", tags = "2, 4, 8")]
    pub(super) data: Option<ValueData>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum ValueData {
    #[prost(float, tag = "2")]
    Scalar(f32),
    #[prost(message, tag = "4")]
    Image(SummaryImage),
    #[prost(message, tag = "8")]
    Tensor(TensorProto),
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SummaryImage {
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
pub(super) struct SummaryMetadata {
    #[prost(message, optional, tag = "1")]
    pub(super) plugin: Option<PluginData>,
    /// 2: a tensor.
    #[prost(int32, tag = "4")]
    pub(super) data_class: i32,
}

/// The TensorBoard plugin that shows a value.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct PluginData {
    #[prost(string, tag = "1")]
    pub(super) name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TensorProto {
    /// 7: strings.
    #[prost(int32, tag = "1")]
    pub(super) dtype: i32,
    #[prost(message, optional, tag = "2")]
    pub(super) shape: Option<TensorShape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    pub(super) strings: Vec<Vec<u8>>,
}

/// A scalar's shape: no dimensions.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TensorShape {}

impl Event {
    fn new(step: u64, data: EventData) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self {
            wall_time: now.map_or(0.0, |since| since.as_secs_f64()),
            step: i64::try_from(step).unwrap_or(i64::MAX),
            data: Some(data),
        }
    }

    pub(super) fn version() -> Self {
        Self::new(0, EventData::FileVersion(VERSION.to_owned()))
    }

    /// Start of a process whose first step is `first`.
    pub(super) fn start(first: u64) -> Self {
        let status = SessionStatus::Start.into();
        Self::new(first, EventData::SessionLog(SessionLog { status }))
    }

    pub(super) fn scalars(step: u64, values: &[(&str, f64)]) -> Self {
        let values = values.iter().map(|(tag, value)| SummaryValue {
            tag: (*tag).to_owned(),
            metadata: None,
            data: Some(ValueData::Scalar(*value as f32)),
        });
        Self::summary(step, values.collect())
    }

    pub(super) fn image(step: u64, tag: &str, (width, height): (u32, u32), png: Vec<u8>) -> Self {
        let side = |pixels| i32::try_from(pixels).unwrap_or(i32::MAX);
        let image = SummaryImage {
            height: side(height),
            width: side(width),
            colorspace: 3,
            encoded: png,
        };
        let value = SummaryValue {
            tag: tag.to_owned(),
            metadata: None,
            data: Some(ValueData::Image(image)),
        };
        Self::summary(step, vec![value])
    }

    /// Text that TensorBoard renders as Markdown.
    pub(super) fn text(step: u64, tag: &str, markdown: &str) -> Self {
        let tensor = TensorProto {
            dtype: 7,
            shape: Some(TensorShape {}),
            strings: vec![markdown.as_bytes().to_vec()],
        };
        let plugin = PluginData {
            name: "text".to_owned(),
        };
        let value = SummaryValue {
            tag: tag.to_owned(),
            metadata: Some(SummaryMetadata {
                plugin: Some(plugin),
                data_class: 2,
            }),
            data: Some(ValueData::Tensor(tensor)),
        };
        Self::summary(step, vec![value])
    }

    fn summary(step: u64, value: Vec<SummaryValue>) -> Self {
        Self::new(step, EventData::Summary(Summary { value }))
    }
}

impl Summary {
    /// Whether the values are scalars.
    pub(super) fn is_scalars(&self) -> bool {
        let scalar = |value: &SummaryValue| matches!(value.data, Some(ValueData::Scalar(_)));
        self.value.first().is_some_and(scalar)
    }

    /// Tags of the images.
    pub(super) fn image_tags(&self) -> impl Iterator<Item = &str> {
        let is_image = |value: &&SummaryValue| matches!(value.data, Some(ValueData::Image(_)));
        self.value
            .iter()
            .filter(is_image)
            .map(|value| value.tag.as_str())
    }
}
