//! Shows that an objective and an adaptation can be added without a change to `src/train`.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use candle_core::{DType, Device, Result};
use coffey::adaptation::{Adaptation, ModelFolder, TensorFile};
use coffey::config;
use coffey::diffusion::{DdimSampler, NoiseSchedule, Sampler, TeacherPredictor};
use coffey::encode::{EncodePool, EncodedBatch, EncoderOptions, Encoders};
use coffey::models::{Denoiser, FileContents, UNet, UNetConfig, Weights, model_metadata};
use coffey::objective::{Loss, Networks, Objective, StepKey, StepOutput, Trace};
use coffey::ops::{self, Attention};
use coffey::params::{ParamSet, Tensors};
use coffey::random::normal;
use coffey::ranks::{Rank, Solo};
use coffey::train::{AdamW, StepOptions, TrainError, TrainState, Trainer, TrainerOptions};
use coffey_pipeline::flow::{FlowMetrics, StageHandle};
use coffey_pipeline::stages::Stage;
use coffey_pipeline::{ImageOptions, S3Options, ShardUrl, Sources, Stream, StreamConfig};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// Regression of the student's one-step samples to the teacher's DDIM endpoints from the same noise.
#[derive(Debug)]
struct EndpointRegression {
    schedule: NoiseSchedule,
    teacher_steps: usize,
}

impl Objective for EndpointRegression {
    fn step(
        &self,
        networks: &Networks<'_>,
        batch: &EncodedBatch,
        key: &StepKey,
    ) -> Result<StepOutput> {
        let (b, channels, h, w) = batch.moments.dims4()?;
        let noise = normal(
            &mut key.rng("noise"),
            &[b, channels / 2, h, w],
            &Device::Cpu,
        )?;
        let teacher = TeacherPredictor {
            denoiser: networks.teacher,
            conditioning: &batch.conditioning,
            unconditional: &batch.conditioning,
            guidance: 1.0,
        };
        let target = self
            .sampler(self.teacher_steps)
            .sample(&teacher, &noise, &mut |_| {
                unreachable!("DDIM adds no noise")
            })?
            .detach();
        let last = vec![self.schedule.len() as i64 - 1; b];
        let output = networks
            .student
            .forward(&noise, &last, &batch.conditioning)?;
        let prediction = self.schedule.predicted_original(&output, &noise, &last)?;
        let loss = Loss::L2.between(&prediction, &target)?;
        let trace = Trace::default().with("noise", &noise).with("loss", &loss);
        Ok(StepOutput { loss, trace })
    }

    fn sampler(&self, steps: usize) -> Box<dyn Sampler + '_> {
        Box::new(DdimSampler::new(&self.schedule, steps))
    }

    fn describe(&self) -> serde_json::Map<String, serde_json::Value> {
        serde_json::Map::new()
    }
}

/// Trains the last convolution of a UNet, without a moving average. Every other tensor stays the teacher's.
#[derive(Debug)]
struct LastConvolution {
    params: ParamSet,
    student: UNet,
    frozen: UNet,
}

impl LastConvolution {
    fn new(folder: &Path) -> Self {
        let config = UNetConfig::read(folder).unwrap();
        let load = || Weights::load(folder, "diffusion_pytorch_model", DType::F32, &Device::Cpu);
        let teacher = load().unwrap().into_tensors();
        let is_trained = |name: &str| name.starts_with("conv_out.");
        let trained = teacher.iter().filter(|(name, _)| is_trained(name));
        let trained: Tensors = trained.map(|(n, t)| (n.clone(), t.clone())).collect();
        let params = ParamSet::new(&trained).unwrap();
        let build = |trained: Tensors| {
            let mut tensors = teacher.clone();
            tensors.extend(trained);
            let weights = Weights::new(tensors, folder);
            let unet = UNet::new(weights.builder(), &config, Attention::Plain).unwrap();
            weights.expect_all_taken(&[]).unwrap();
            unet
        };
        Self {
            student: build(params.tracked()),
            frozen: build(params.detached()),
            params,
        }
    }
}

impl Adaptation for LastConvolution {
    fn describe(&self) -> String {
        "the last convolution".to_owned()
    }

    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn target_params(&self) -> Option<&ParamSet> {
        None
    }

    fn student(&self) -> &dyn Denoiser {
        &self.student
    }

    fn frozen_student(&self) -> &dyn Denoiser {
        &self.frozen
    }

    fn target(&self) -> &dyn Denoiser {
        &self.frozen
    }

    fn checkpoint(&self) -> Result<Vec<ModelFolder>> {
        let weights = TensorFile {
            name: "diffusion_pytorch_model.safetensors".to_owned(),
            contents: FileContents {
                tensors: self.params.values(),
                metadata: model_metadata(),
            },
        };
        Ok(vec![ModelFolder {
            name: "unet".to_owned(),
            files: vec![weights],
            config: Some(self.student.config().to_json().clone()),
        }])
    }
}

/// Batches of the quickstart's images, encoded.
struct Batches {
    pool: EncodePool,
    stage: StageHandle,
    // Dropped last: the pool's threads wait on it.
    _runtime: Runtime,
}

impl Batches {
    fn open(teacher: &Path, batch_size: usize) -> Self {
        let runtime = Runtime::new().unwrap();
        let metrics = FlowMetrics::new();
        let sources = Sources::new(S3Options::default());
        let sources = runtime.block_on(sources).unwrap();
        let shard = Path::new("assets/quickstart/emoji/00000.tar");
        let config = StreamConfig {
            shards: vec![ShardUrl::file(shard.to_owned())],
            batch_size,
            image: ImageOptions {
                resolution: 64,
                ..ImageOptions::default()
            },
            ..StreamConfig::default()
        };
        let stream = Stream::open(config, &sources, &metrics, runtime.handle()).unwrap();
        let encoders = Encoders::load(
            teacher,
            None,
            &Device::Cpu,
            EncoderOptions::exact(batch_size),
        )
        .unwrap();
        let encoders = vec![Arc::new(encoders)];
        Self {
            pool: EncodePool::start(stream, encoders, &metrics, runtime.handle()).unwrap(),
            stage: metrics.stage(Stage::Train),
            _runtime: runtime,
        }
    }

    fn next(&mut self) -> std::result::Result<EncodedBatch, TrainError> {
        let batch = self
            .pool
            .next(&self.stage, &CancellationToken::new(), Duration::MAX)?;
        batch.ok_or(TrainError::StreamEnded { step: 0 })
    }
}

/// A trainer of the last convolution towards the teacher's endpoints, with its batches.
fn trainer(student: LastConvolution) -> (Trainer, Batches) {
    let pipeline = Path::new("assets/quickstart/teacher");
    let unet = pipeline.join("unet");
    let batches = Batches::open(pipeline, 4);
    let optimizer = config::Optimizer {
        learning_rate: 1e-3,
        ..config::Optimizer::default()
    };
    let teacher = UNet::load(&unet, DType::F32, &Device::Cpu, Attention::Plain).unwrap();
    let adamw = AdamW::new(&optimizer, student.params(), false, Rank::SOLO).unwrap();
    let options = TrainerOptions {
        seed: 1,
        max_steps: 12,
        lanes: coffey_pipeline::Lanes::all(1, 2),
        rank_timeout: Duration::from_secs(60),
        ema_decay: 0.95,
        optimizer,
    };
    let trainer = Trainer::new(
        Box::new(EndpointRegression {
            schedule: NoiseSchedule::read(&pipeline.join("scheduler")).unwrap(),
            teacher_steps: 4,
        }),
        Rc::new(teacher),
        TrainState::new(Box::new(student), adamw),
        Rc::new(Solo),
        options,
        batches.stage.clone(),
    );
    (trainer, batches)
}

fn options(cancel: &CancellationToken) -> StepOptions<'_> {
    StepOptions {
        cancel,
        keep_traces: true,
    }
}

fn student() -> LastConvolution {
    LastConvolution::new(Path::new("assets/quickstart/teacher/unet"))
}

#[test]
fn objective_and_adaptation_of_a_test_train_a_student() {
    let (mut trainer, mut batches) = trainer(student());
    let cancel = CancellationToken::new();
    let before: Vec<String> = trainer
        .state()
        .student
        .params()
        .values()
        .into_keys()
        .collect();
    assert_eq!(before, ["conv_out.bias", "conv_out.weight"]);
    let mut losses = Vec::new();
    for _ in 0..12 {
        let report = trainer
            .step(&mut || batches.next(), options(&cancel))
            .unwrap();
        assert_eq!(report.traces.len(), 2, "one trace a micro-batch");
        assert!(report.record.grad_norm > 0.0);
        losses.push(report.record.loss);
    }
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..3]), mean(&losses[9..]));
    assert!(last < 0.9 * first, "the loss falls: {losses:?}");
    assert_eq!(trainer.state().step, 12);
    assert_eq!(trainer.state().samples, 96);
}

#[test]
fn objective_of_a_test_has_the_gradient_of_its_loss() {
    let (mut trainer, mut batches) = trainer(student());
    let batch = [batches.next().unwrap(), batches.next().unwrap()];
    // The same two micro-batches by hand.
    let reference = student();
    let (objective, teacher) = (trainer.objective(), &reference.frozen);
    let networks = Networks {
        student: &reference.student,
        target: &reference.frozen,
        teacher,
    };
    let mut squares = 0.0;
    let mut sums = Tensors::new();
    for (micro_batch, batch) in batch.iter().enumerate() {
        let key = StepKey {
            seed: 1,
            step: 1,
            micro_batch: micro_batch as u64,
        };
        let loss = || Ok((objective.step(&networks, batch, &key)?.loss, ()));
        let (found, ()) = ops::gradients(loss).unwrap();
        for (name, var) in reference.params.iter() {
            let half = (found.get(var).unwrap() * 0.5).unwrap();
            let sum = match sums.remove(name) {
                Some(sum) => (sum + half).unwrap(),
                None => half,
            };
            sums.insert(name.clone(), sum);
        }
    }
    for sum in sums.values() {
        squares += sum
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
    }
    let mut batch = batch.into_iter();
    let report = trainer
        .step(
            &mut || Ok(batch.next().unwrap()),
            options(&CancellationToken::new()),
        )
        .unwrap();
    let want = f64::from(squares).sqrt();
    assert!(
        (report.record.grad_norm / want - 1.0).abs() < 1e-5,
        "{} {want}",
        report.record.grad_norm
    );
}
