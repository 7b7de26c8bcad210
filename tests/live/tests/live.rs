// SPDX-License-Identifier: Apache-2.0
//! The driver against a running installation. See the crate's table of variables.
use openshell_driver_substrate::{Config, names};
use substrate_live::{Driver, KEYS, PATIENCE, condition, config, sandbox, variable};
use substrate_proto::compute::watch_sandboxes_event::Payload;
use substrate_proto::compute::{self, DriverSandbox, WatchSandboxesEvent};
use tonic::{Code, Streaming};

type Watching = Streaming<WatchSandboxesEvent>;

async fn until(watching: &mut Watching, id: &str, done: impl Fn(&DriverSandbox) -> bool) {
    let search = async {
        loop {
            let event = watching.message().await.expect("the watch goes on").expect("the watch goes on");
            if let Some(Payload::Sandbox(update)) = event.payload
                && let Some(sandbox) = update.sandbox.filter(|sandbox| sandbox.id == id)
            {
                if done(&sandbox) {
                    return;
                }
                let (ready, why) = condition(&sandbox, "Ready");
                assert!(
                    ready == "True" || why.starts_with("Starting") || why.starts_with("Dependencies"),
                    "{why}"
                );
            }
        }
    };
    tokio::time::timeout(PATIENCE, search).await.expect("in time");
}

fn is_ready(sandbox: &DriverSandbox) -> bool {
    condition(sandbox, "Ready").0 == "True"
}

async fn whole_life(driver: &mut Driver, wanted: &DriverSandbox) {
    let id = wanted.id.as_str();
    let mut watching = driver.watch().await;
    driver.create(wanted).await.unwrap();
    until(&mut watching, id, is_ready).await;
    let listed = driver.list().await.unwrap();
    let found = listed.iter().find(|sandbox| sandbox.id == id).expect("it is listed");
    assert_eq!((&found.name, &found.workspace), (&wanted.name, &wanted.workspace));
    let request = compute::StopSandboxRequest { sandbox_id: id.to_owned(), ..Default::default() };
    driver.client.stop_sandbox(request).await.unwrap();
    assert_eq!(condition(&driver.get(id).await.unwrap(), "Suspended").0, "True");
    let request = compute::StartSandboxRequest { sandbox_id: id.to_owned(), ..Default::default() };
    driver.client.start_sandbox(request).await.unwrap();
    assert!(is_ready(&driver.get(id).await.unwrap()));
    assert!(driver.delete(id).await.unwrap());
    assert!(!driver.delete(id).await.unwrap());
    assert_eq!(driver.get(id).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
#[ignore = "needs a running installation: SUBSTRATE_LIVE_*"]
async fn a_sandbox_lives_from_create_to_delete() {
    let config = config(&["API_ENDPOINT", "NAMESPACE", "WORKER_POOL"]);
    let wanted = sandbox(&variable("NAMESPACE"), &variable("TEST_IMAGE"));
    let mut driver = Driver::start(config).await;
    whole_life(&mut driver, &wanted).await;
    driver.stop().await;
}

#[tokio::test]
#[ignore = "needs a running installation: SUBSTRATE_LIVE_*"]
async fn a_premade_template_is_used() {
    let template = variable("TEMPLATE_NAME");
    let mut wanted = sandbox(&variable("NAMESPACE"), "");
    let named = [(names::PREMADE_TEMPLATE.to_owned(), compute_value(&template))];
    if let Some(spec) = wanted.spec.as_mut().and_then(|spec| spec.template.as_mut()) {
        spec.platform_config = Some(prost_struct(named));
    }
    let mut driver = Driver::start(config(&["API_ENDPOINT", "NAMESPACE"])).await;
    whole_life(&mut driver, &wanted).await;
    driver.stop().await;
}

#[tokio::test]
#[ignore = "needs a running installation: SUBSTRATE_LIVE_*"]
async fn the_connection_is_really_secured() {
    let good = config(&["API_ENDPOINT", "NAMESPACE", "CA_PATH", "TLS_SERVER_NAME", "BEARER_TOKEN_PATH"]);
    assert!(good.api_endpoint.starts_with("https://"), "SUBSTRATE_LIVE_API_ENDPOINT is not https");
    let mut driver = Driver::start(good.clone()).await;
    driver.list().await.expect("with everything right");
    driver.stop().await;
    let stranger = Config { api_tls_server_name: Some("not-the-server.invalid".to_owned()), ..good.clone() };
    let mut driver = Driver::start(stranger).await;
    let error = driver.list().await.expect_err("a wrong server name");
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    driver.stop().await;
    let mut driver = Driver::start(Config { api_bearer_token_path: None, ..good }).await;
    let error = driver.list().await.expect_err("no token");
    assert_eq!(error.code(), Code::Unauthenticated, "{error}");
    driver.stop().await;
}

#[tokio::test]
#[ignore = "needs a running installation: SUBSTRATE_LIVE_*"]
async fn the_whole_documented_table_works() {
    let all: Vec<&str> = KEYS.iter().map(|(name, _)| *name).collect();
    let mut driver = Driver::start(config(&all)).await;
    let request = compute::GetCapabilitiesRequest {};
    let capabilities = driver.client.get_capabilities(request).await.unwrap().into_inner();
    assert_eq!(capabilities.driver_name, "substrate");
    driver.list().await.unwrap();
    driver.stop().await;
}

fn compute_value(text: &str) -> prost_types::Value {
    prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(text.to_owned())) }
}

fn prost_struct<const N: usize>(fields: [(String, prost_types::Value); N]) -> prost_types::Struct {
    prost_types::Struct { fields: fields.into() }
}
