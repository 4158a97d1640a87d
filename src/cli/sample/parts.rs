//! Which folders the parts of a pipeline are in.

use std::path::{Path, PathBuf};

use crate::encode::Encoders;
use crate::models::UNetConfig;

use super::Failure;

/// What a pipeline has besides its UNet.
const OTHERS: [&str; 4] = ["scheduler", "text_encoder", "tokenizer", "vae"];

/// The folders of one pipeline.
#[derive(Debug, PartialEq)]
pub(super) struct Parts {
    /// The UNet that draws.
    pub(super) unet: PathBuf,
    /// Where the other parts are.
    pub(super) pipeline: PathBuf,
    /// A VAE from elsewhere.
    pub(super) vae: Option<PathBuf>,
}

/// `run.json`, as `coffey train` leaves it in the folder of a run.
#[derive(serde::Deserialize)]
struct Run {
    teacher: PathBuf,
    vae: Option<PathBuf>,
}

impl Parts {
    /// Looks in `model`, then in `teacher`, or if that is not given, where the run says.
    pub(super) fn find(
        model: &Path,
        teacher: Option<&Path>,
        unet: Option<&str>,
    ) -> Result<Self, Failure> {
        let unet = find_unet(model, unet)?;
        let run = find_run(model)?;
        let vae = run.as_ref().and_then(|run| run.vae.clone());
        let pipeline = match (teacher, run) {
            (Some(teacher), _) => teacher.to_owned(),
            (None, _) if missing(model).is_empty() => {
                return Ok(Self {
                    unet,
                    pipeline: model.to_owned(),
                    vae: None,
                });
            }
            (None, Some(run)) => run.teacher,
            (None, None) => {
                return failed(format!(
                    "{} has no {}, and no run.json beside it says where they are; give --teacher DIR",
                    model.display(),
                    missing(model).join(", ")
                ));
            }
        };
        let missing = missing(&pipeline);
        match missing.is_empty() {
            true => Ok(Self {
                unet,
                pipeline,
                vae,
            }),
            false => failed(format!(
                "{} has no {}; --teacher DIR names the folder that has",
                pipeline.display(),
                missing.join(", ")
            )),
        }
    }

    /// Whether the parts belong together.
    pub(super) fn fit(&self, unet: &UNetConfig, encoders: &Encoders) -> Result<(), Failure> {
        let pairs = [
            (
                "the width of the text embeddings",
                unet.cross_attention_dim,
                encoders.text_width(),
            ),
            (
                "the number of latent channels",
                unet.in_channels,
                encoders.vae().config().latent_channels,
            ),
        ];
        for (what, needed, found) in pairs {
            if needed != found {
                return failed(format!(
                    "{} and {} do not belong together: {what} is {needed} in the one and {found} in the other",
                    self.unet.display(),
                    self.pipeline.display()
                ));
            }
        }
        Ok(())
    }
}

fn failed<T>(message: String) -> Result<T, Failure> {
    Err(Failure::Failed(message.into()))
}

/// Parts besides the UNet that are not in a folder.
fn missing(folder: &Path) -> Vec<&'static str> {
    OTHERS
        .into_iter()
        .filter(|part| !folder.join(part).is_dir())
        .collect()
}

fn find_unet(model: &Path, name: Option<&str>) -> Result<PathBuf, Failure> {
    let names = name.map_or_else(|| vec!["unet_target", "unet"], |name| vec![name]);
    match names
        .iter()
        .map(|name| model.join(name))
        .find(|folder| folder.is_dir())
    {
        Some(folder) => Ok(folder),
        None => failed(format!(
            "{} has no folder {}",
            model.display(),
            names.join(" or ")
        )),
    }
}

/// The run that a folder, or the folder it is in, belongs to.
fn find_run(model: &Path) -> Result<Option<Run>, Failure> {
    // Absolute, because "checkpoint-100" has a parent too.
    let model = std::path::absolute(model)?;
    let Some(path) = model
        .ancestors()
        .take(2)
        .map(|folder| folder.join("run.json"))
        .find(|path| path.is_file())
    else {
        return Ok(None);
    };
    let text = std::fs::read_to_string(&path)?;
    match serde_json::from_str(&text) {
        Ok(run) => Ok(Some(run)),
        Err(error) => failed(format!(
            "{}: {error}; give --teacher DIR instead",
            path.display()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folders(root: &Path, names: &[&str]) {
        for name in names {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
    }

    fn message(result: Result<Parts, Failure>) -> String {
        match result.unwrap_err() {
            Failure::Failed(error) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_pipeline_has_all_its_parts() {
        let root = tempfile::tempdir().unwrap();
        folders(
            root.path(),
            &[
                "scheduler",
                "text_encoder",
                "tokenizer",
                "vae",
                "unet",
                "unet_target",
            ],
        );
        let found = Parts::find(root.path(), None, None).unwrap();
        assert_eq!(found.unet, root.path().join("unet_target"));
        assert_eq!(found.pipeline, root.path());
        let found = Parts::find(root.path(), None, Some("unet")).unwrap();
        assert_eq!(found.unet, root.path().join("unet"));
        assert!(message(Parts::find(root.path(), None, Some("other"))).contains("no folder other"));
    }

    #[test]
    fn a_run_and_its_checkpoints_know_their_teacher() {
        let root = tempfile::tempdir().unwrap();
        let (run, teacher) = (root.path().join("run"), root.path().join("teacher"));
        folders(&run, &["unet", "checkpoint-5/unet"]);
        let alone = message(Parts::find(&run, None, None));
        assert!(
            alone.contains("--teacher") && alone.contains("text_encoder"),
            "{alone}"
        );
        std::fs::write(
            run.join("run.json"),
            serde_json::json!({"teacher": teacher, "vae": "elsewhere"}).to_string(),
        )
        .unwrap();
        let absent = message(Parts::find(&run, None, None));
        assert!(absent.contains("teacher has no scheduler"), "{absent}");
        folders(&teacher, &OTHERS);
        for model in [run.clone(), run.join("checkpoint-5")] {
            let found = Parts::find(&model, None, None).unwrap();
            assert_eq!(
                (found.pipeline, found.vae),
                (teacher.clone(), Some("elsewhere".into()))
            );
        }
        std::fs::write(run.join("run.json"), "{}").unwrap();
        assert!(
            message(Parts::find(&run, None, None)).contains("run.json: missing field `teacher`")
        );
    }
}
