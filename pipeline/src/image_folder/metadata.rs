//! Metadata files as Hugging Face's `imagefolder` reads them: `metadata.jsonl` and `metadata.csv`.
//!
//! Rows are read again when their samples are, so that memory holds no captions.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use csv::StringRecord;
use serde_json::{Map, Value};

use crate::json::Document;
use crate::net::SourceError;
use crate::regular_file;

/// The key of a row that names the image.
const FILE_NAME: &str = "file_name";

/// A metadata file.
#[derive(Debug)]
pub(super) struct Metadata {
    pub(super) path: PathBuf,
    form: Form,
}

#[derive(Debug, Clone)]
enum Form {
    JsonLines,
    Csv { header: StringRecord },
}

/// The place of a row.
#[derive(Debug, Clone)]
pub(super) struct Row {
    /// Index of the metadata file.
    pub(super) table: usize,
    /// Bytes of the row in the file.
    pub(super) range: Range<u64>,
}

impl Metadata {
    /// Reads the file, and passes the line, the image's name and the place of each row to `each`.
    ///
    /// # Errors
    /// [`SourceError::File`] for a row that can't be read or that `each` refuses.
    pub(super) fn read(
        path: &Path,
        each: impl FnMut(u64, String, Range<u64>) -> Result<(), String>,
    ) -> Result<Self, SourceError> {
        let failed = |cause: String| SourceError::File {
            url: path.display().to_string(),
            cause,
        };
        let file = regular_file::open(path).map_err(|error| failed(error.to_string()))?;
        let form = if path.extension().is_some_and(|extension| extension == "csv") {
            read_csv(file, each)
        } else {
            read_json_lines(file, each)
        };
        Ok(Self {
            path: path.to_owned(),
            form: form.map_err(failed)?,
        })
    }

    /// Reads a row as JSON.
    ///
    /// # Errors
    /// [`SourceError::File`] if the file changed since it was listed.
    pub(super) fn row(&self, file: &File, range: &Range<u64>) -> Result<Document, SourceError> {
        let read = || {
            let length = usize::try_from(range.end - range.start).map_err(|e| e.to_string())?;
            let mut bytes = vec![0; length];
            let read = file.read_exact_at(&mut bytes, range.start);
            read.map_err(|error| error.to_string())?;
            match &self.form {
                Form::JsonLines => Document::parse(&bytes).map_err(|error| error.to_string()),
                Form::Csv { header } => csv_row(header, &bytes),
            }
        };
        read().map_err(|cause| SourceError::File {
            url: self.path.display().to_string(),
            cause: format!("changed since it was listed: {cause}"),
        })
    }
}

fn read_json_lines(
    file: File,
    mut each: impl FnMut(u64, String, Range<u64>) -> Result<(), String>,
) -> Result<Form, String> {
    let mut reader = BufReader::new(file);
    let (mut line, mut start) = (Vec::new(), 0);
    for number in 1.. {
        line.clear();
        let read = reader.read_until(b'\n', &mut line);
        let end = start + read.map_err(|error| error.to_string())? as u64;
        if end == start {
            break;
        }
        if !line.trim_ascii().is_empty() {
            let named = Document::parse(&line)
                .map_err(|error| error.to_string())
                .and_then(|row| match row.get(FILE_NAME) {
                    Some(Value::String(name)) => Ok(name),
                    _ => Err(format!("has no {FILE_NAME:?}, the name of the image")),
                })
                .and_then(|name| each(number, name, start..end));
            named.map_err(|cause| format!("line {number} {cause}"))?;
        }
        start = end;
    }
    Ok(Form::JsonLines)
}

fn read_csv(
    file: File,
    mut each: impl FnMut(u64, String, Range<u64>) -> Result<(), String>,
) -> Result<Form, String> {
    let mut reader = csv::Reader::from_reader(file);
    let header = reader.headers().map_err(|error| error.to_string())?.clone();
    let column = header.iter().position(|name| name == FILE_NAME);
    let column = column.ok_or_else(|| {
        format!(
            "has no column {FILE_NAME:?}, the name of the image; its first line names the columns"
        )
    })?;
    let mut record = StringRecord::new();
    loop {
        let start = reader.position().byte();
        if !reader
            .read_record(&mut record)
            .map_err(|error| error.to_string())?
        {
            return Ok(Form::Csv { header });
        }
        let line = record.position().map_or(0, csv::Position::line);
        let name = record.get(column).unwrap_or_default().to_owned();
        each(line, name, start..reader.position().byte())
            .map_err(|cause| format!("line {line} {cause}"))?;
    }
}

/// A row of a CSV file, as an object of strings.
fn csv_row(header: &StringRecord, bytes: &[u8]) -> Result<Document, String> {
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .from_reader(bytes);
    let mut record = StringRecord::new();
    let read = reader.read_record(&mut record);
    read.map_err(|error| error.to_string())?;
    if record.len() != header.len() {
        return Err(format!("a row has {} fields", record.len()));
    }
    let pair = |(name, value): (&str, &str)| (name.to_owned(), Value::from(value));
    let object: Map<String, Value> = header.iter().zip(&record).map(pair).collect();
    Document::parse(Value::from(object).to_string().as_bytes()).map_err(|error| error.to_string())
}
