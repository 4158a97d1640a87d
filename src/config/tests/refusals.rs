//! Every kind of mistake, with its message.

use super::*;

/// The message for `MINIMAL` with more lines below it.
fn refusal(more: &str) -> String {
    parse(&format!("{MINIMAL}{more}"), &[])
        .unwrap_err()
        .to_string()
}

/// The message for `MINIMAL` with one override.
fn refused(argument: &str) -> String {
    parse(MINIMAL, &[argument]).unwrap_err().to_string()
}

#[test]
fn bad_override_names_its_argument() {
    assert_eq!(
        refused("train.max_steps"),
        "-s train.max_steps: needs the form key=value, as train.max_steps=10"
    );
    assert!(refused("train.output=").starts_with("-s train.output=: has no value"));
    assert!(refused("train..x=1").contains("\"train..x\" is not a key"));
    assert!(
        refused("data.shards=[\"a.tar\"")
            .starts_with("-s data.shards=[\"a.tar\": the value is not valid TOML:")
    );
    assert_eq!(
        refused("data.shards.x=1"),
        "-s data.shards.x: shards is not a table, so nothing in it can be set"
    );
    assert_eq!(
        refused("train.max_step=1"),
        "-s train.max_step: unknown key train.max_step; did you mean train.max_steps?"
    );
    assert_eq!(
        refused("train.max_steps=ten"),
        "-s train.max_steps=ten: key train.max_steps = \"ten\": wrong type: found a string, needs a whole \
         number, 0 or more"
    );
    assert_eq!(
        refused("train.max_steps=0"),
        "-s train.max_steps=0: key train.max_steps = 0: must be at least 1"
    );
    // The error names the last argument that sets the key.
    let message = parse(MINIMAL, &["s3.max_attempts=0", "s3={ max_attempts = 0 }"]).unwrap_err();
    assert!(message.to_string().starts_with("-s s3={"), "{message}");
}

#[test]
fn override_of_an_unknown_key_shows_no_value() {
    for (argument, start) in [
        (
            "s3.secret_access_key=S3CRET",
            "-s s3.secret_access_key: unknown key",
        ),
        ("hub.token=S3CRET", "-s hub.token: unknown key hub.token"),
        ("nope.key=S3CRET", "-s nope.key: unknown key nope;"),
        ("hub=S3CRET", "-s hub: key hub = …: wrong type"),
        ("s3={ secret = \"S3CRET\" }", "-s s3: unknown key s3.secret"),
        (
            "s3.session_token=\"S3CRET",
            "-s s3.session_token: the value",
        ),
        (
            "data.http_header=[\"http://h X: S3CRET\"]",
            "-s data.http_header: unknown key",
        ),
        (
            "data={ http_headers=[\"http://h X: S3CRET\"] }",
            "-s data: ",
        ),
        (
            "s3.endpoint_url=user:S3CRET@x",
            "-s s3.endpoint_url=REDACTED@x: key",
        ),
    ] {
        let message = coffey_pipeline::text::message(&refused(argument));
        assert!(message.starts_with(start), "{message}");
        assert!(!message.contains("S3CRET"), "{message}");
    }
    assert!(refused(&format!("train.device={}", "x".repeat(5000))).len() < 1000);
}

#[test]
fn unknown_key_names_the_nearest_key() {
    assert_eq!(
        refusal("\n[train]\nmax_step = 5\n"),
        "a.toml:5: unknown key train.max_step; did you mean train.max_steps?"
    );
    assert_eq!(
        refusal("max_steps = 5\n"),
        "a.toml:3: unknown key data.max_steps; did you mean train.max_steps?"
    );
    assert_eq!(
        refusal("[trian]\nmax_steps = 5\n"),
        "a.toml:3: unknown key trian; did you mean [train]?"
    );
    assert!(refusal("[data.fliter]\nmin_size = 5\n").ends_with("did you mean [data.filter]?"));
    assert!(refusal("[hub]\npush = 5\n").ends_with("did you mean hub.push_to?"));
    assert!(refusal("[audit]\nqqqq = 5\n").ends_with("[audit] knows dir, steps"));
    assert!(refused("zzz=5").contains("it belongs in a table, one of data, data.filter, s3"));
    assert!(refused("zzz.y=5").contains("the tables are data, data.filter, s3"));
}

#[test]
fn wrong_type_names_found_and_needed_type() {
    for (more, end) in [
        (
            "kind = 3\n",
            "key data.kind = 3: wrong type: found a whole number, needs one of \"images\", \"latents\"",
        ),
        ("image_keys = \"jpg\"\n", "found a string, needs a list"),
        (
            "image_keys = [\"jpg\", 3]\n",
            "key data.image_keys[1] = 3: wrong type: found a whole number, needs a string",
        ),
        (
            "resample_shards = 1\n",
            "found a whole number, needs true or false",
        ),
        (
            "max_bad_fraction = \"low\"\n",
            "found a string, needs a number",
        ),
        (
            "open_shards = 1.5\n",
            "found a number with a fraction, needs a whole number, 0 or more",
        ),
        (
            "open_shards = -1\n",
            "key data.open_shards = -1: must be at least 1",
        ),
        (
            "open_shards = 2020-01-01\n",
            "found a date, needs a whole number, 0 or more",
        ),
        (
            "filter = 3\n",
            "found a whole number, needs a table, as [data.filter]",
        ),
    ] {
        let message = refusal(more);
        assert!(message.starts_with("a.toml:3: key data."), "{message}");
        assert!(message.ends_with(end), "{message}");
    }
    let message = parse("[data]\nshards = 3\n", &[]).unwrap_err().to_string();
    assert!(
        message.ends_with("needs a string or a list of strings"),
        "{message}"
    );
    let message = parse("data = 3\n", &[]).unwrap_err().to_string();
    assert!(message.ends_with("needs a table, as [data]"), "{message}");
}

#[test]
fn unknown_words_list_the_choices() {
    assert_eq!(
        refusal("[image]\ncrop = \"middle\"\n"),
        "a.toml:4: key image.crop = \"middle\": unknown value; choose one of \"random\", \"center\""
    );
    assert!(
        refused("optimizer.schedule=flat").ends_with("\"cosine_with_restarts\", \"polynomial\"")
    );
    assert!(refused("optimizer.kind=sgd").ends_with("choose one of \"adamw\", \"adamw8bit\""));
}

#[test]
fn hub_push_is_refused_for_an_output_in_s3() {
    let message = parse(
        MINIMAL,
        &["train.output=s3://runs/a", "hub.push_to=user/model"],
    );
    let message = message.unwrap_err().to_string();
    assert!(
        message.contains("hub.push_to") && message.contains("train.output"),
        "{message}"
    );
}

#[test]
fn syntax_error_has_line_and_column() {
    let message = refusal("[train\n");
    assert!(
        message.starts_with("a.toml:3:7: not valid TOML: "),
        "{message}"
    );
    let message = refusal("shards = \"b\"\n");
    assert!(
        message.starts_with("a.toml:3:1: not valid TOML: "),
        "{message}"
    );
}

#[test]
fn unreadable_file_is_named() {
    let message = Config::load(Path::new("no/such.toml"), &[]).unwrap_err();
    assert!(matches!(message, ConfigError::Read { .. }));
    assert!(message.to_string().contains("no/such.toml"), "{message}");
}

#[test]
fn missing_key_is_named_with_its_meaning() {
    let message = parse("", &[]).unwrap_err().to_string();
    assert!(
        message.starts_with("a.toml: missing required key data.shards: the URLs"),
        "{message}"
    );
    let message = parse("\n[data]\nkind = \"images\"\n", &[])
        .unwrap_err()
        .to_string();
    assert!(
        message.starts_with("a.toml:2: missing required key data.shards: the URLs"),
        "{message}"
    );
    let message = refusal("[validation]\nevery = 3\n");
    assert!(
        message.starts_with("a.toml:3: missing required key validation.prompts:"),
        "{message}"
    );

    let message = with(&[]).require_train().unwrap_err().to_string();
    assert!(
        message.starts_with("a.toml: missing required key model.teacher:"),
        "{message}"
    );
    let config = with(&["model.teacher=."]);
    let message = config.require_train().unwrap_err().to_string();
    assert!(
        message.starts_with("a.toml: missing required key train.output:"),
        "{message}"
    );
    let message = config.require_precompute().unwrap_err().to_string();
    assert!(
        message.starts_with("a.toml: missing required key latents.output:"),
        "{message}"
    );
    assert!(config.require_bench().is_ok());
}

#[test]
fn absent_model_folder_is_named() {
    let need = |arguments: &[&str]| with(arguments).require_train().unwrap_err().to_string();
    assert_eq!(
        need(&["model.teacher=/no/such/teacher"]),
        "-s model.teacher=/no/such/teacher: key model.teacher = \"/no/such/teacher\": no such folder; a model is a \
         folder in diffusers layout, s3://bucket/prefix or a Hub id as user/model"
    );
    let message = need(&["model.teacher=.", "model.vae=./sd-vae-ft-mse"]);
    assert!(
        message.contains("key model.vae = \"./sd-vae-ft-mse\": no such folder;"),
        "{message}"
    );
    // Only the output is missing.
    let message = need(&["model.teacher=a/b", "model.vae=s3://c", "model.revision=v1"]);
    assert!(message.contains("train.output"), "{message}");
}

#[test]
fn revision_needs_a_hub_model() {
    for revision in ["", "a b", "../x", "a//b", "/a", "a?b"] {
        let message = refused(&format!("model.revision={revision:?}"));
        assert!(message.contains("must be a branch"), "{message}");
    }
    for teacher in [".", "s3://bucket/model"] {
        let teacher = format!("model.teacher={teacher}");
        let config = with(&[&teacher, "model.revision=v1", "train.output=a"]);
        let message = config.require_train().unwrap_err().to_string();
        assert!(
            message.contains("model.revision = \"v1\": has no effect"),
            "{message}"
        );
    }
}

#[cfg(feature = "embedded-s3")]
#[test]
fn absent_embedded_root_is_named() {
    let config = with(&["s3.embedded_root=no/such"]);
    let message = config.require_bench().unwrap_err().to_string();
    assert_eq!(
        message,
        "-s s3.embedded_root=no/such: key s3.embedded_root = \"no/such\": no such folder"
    );
}

#[cfg(not(feature = "embedded-s3"))]
#[test]
fn embedded_root_needs_its_feature() {
    assert!(refused("s3.embedded_root=a").contains("built without the embedded S3 server"));
}

#[test]
fn values_out_of_range_are_refused() {
    for argument in [
        "data.shards=[]",
        "data.shards=\"\"",
        "data.image_keys=[]",
        "data.caption_keys=[\"\"]",
        "data.max_samples=0",
        "data.shuffle_buffer=0",
        "data.shuffle_buffer_mb=0",
        "data.open_shards=0",
        "data.decode_threads=0",
        "data.prefetch_batches=0",
        "data.max_bad_fraction=1.5",
        "data.max_bad_fraction=nan",
        "data.filter.max_pwatermark=-0.1",
        "data.filter.max_punsafe=2",
        "data.filter.min_similarity=1.5",
        "data.filter.min_aesthetic=inf",
        "data.filter={min_caption_chars=5,max_caption_chars=4}",
        "s3.max_attempts=0",
        "s3.endpoint_url=localhost:9000",
        "s3.embedded_root=\"\"",
        "s3={endpoint_url=\"http://localhost\",embedded_root=\"a\"}",
        "image.resolution=0",
        "image.resolution=100",
        "model.teacher=\"\"",
        "model.time_cond_proj_dim=2",
        "encode.devices=[]",
        "encode.devices=[\"gpu\"]",
        "encode.batch_size=0",
        "distill.num_ddim_timesteps=0",
        "distill.num_ddim_timesteps=30",
        "distill.w_min=-1",
        "distill.w_min=20",
        "distill.w_max=inf",
        "distill.huber_c=0",
        "distill.timestep_scaling=0",
        "distill.ema_decay=1.1",
        "distill={objective=\"pcm\",num_ddim_timesteps=2}",
        "distill.phases=4",
        "track.wandb=\"a/b\"",
        "track.wandb=\"\"",
        "distill.proportion_empty_prompts=-0.5",
        "optimizer.learning_rate=0",
        "optimizer.beta1=1",
        "optimizer.beta2=-0.1",
        "optimizer.weight_decay=-1",
        "optimizer.epsilon=0",
        "optimizer.max_grad_norm=0",
        "optimizer.warmup_steps=5",
        "train.output=\"\"",
        "train.device=cuda",
        "train.max_steps=0",
        "train.batch_size=0",
        "train.gradient_accumulation=0",
        "train.seed=-1",
        "train.stall_timeout=0",
        "checkpoint.every=0",
        "checkpoint.keep=0",
        "validation={prompts=[]}",
        "validation={prompts=[\"a\"],prompts_file=\"a.txt\"}",
        "validation={prompts_file=\"\"}",
        "validation={prompts=[\"a\"],every=0}",
        "validation={prompts=[\"a\"],steps=0}",
        "validation={prompts=[\"a\"],steps=51}",
        "validation={prompts=[\"a\"],guidance=-1}",
        "validation={prompts=[\"a\"],images_per_prompt=0}",
        "report.endpoint_every=0",
        "report.guidance=-1",
        "report.grid=true",
        "latents.output=\"\"",
        "latents={output=\"a\",crops=0}",
        "audit.dir=\"\"",
        "audit={dir=\"a\",steps=0}",
    ] {
        let error = parse(MINIMAL, &[argument]).unwrap_err();
        assert!(
            matches!(error, ConfigError::Invalid { .. }),
            "{argument}: {error}"
        );
        assert!(
            error
                .to_string()
                .starts_with(&format!("-s {argument}: key ")),
            "{error}"
        );
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn cuda_device_needs_a_cuda_build() {
    assert_eq!(
        refused("encode.devices=[\"cpu\", \"cuda:1\"]"),
        "-s encode.devices=[\"cpu\", \"cuda:1\"]: key encode.devices[1] = \"cuda:1\": this binary was built \
         without CUDA; use \"cpu\" or build with `--features cuda`"
    );
    assert!(refused("train.device=cuda:0").contains("built without CUDA"));
}
