//! `POST /machines`: an order is handed to `nacelle launch`, which is what `nacelle run -d` does.

use std::{process::Stdio, sync::Arc};

use bytes::Bytes;
use hyper::{
    StatusCode,
    header::{HeaderValue, LOCATION},
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
};

use super::{
    Service,
    answer::{Answered, Refusal, json_of},
    routes::Asked,
};
use crate::cli::order::Order;

/// Longest answer of a launch, in bytes.
const ANSWER_MAX: u64 = 4 << 20;

/// Launches a machine; answered when its command runs.
pub async fn launch(service: &Arc<Service>, asked: &mut Asked) -> Answered {
    asked.streams()?;
    let body = asked.body().await?;
    // What is plainly wrong need not wait for a turn.
    let order: Order = serde_json::from_slice(&body).map_err(|e| Refusal::wrong(api::explain_json(&e)))?;
    order.check()?;
    let service = Arc::clone(service);
    // A launch that was begun is finished, also when its client goes away.
    let launched = tokio::spawn(async move { carry_out(&service, body).await });
    let machine = launched.await.map_err(|_| Refusal::failed("The launch broke off"))??;
    let mut response = json_of(&machine)?;
    *response.status_mut() = StatusCode::CREATED;
    let name = machine.get("name").and_then(Value::as_str).unwrap_or_default();
    if let Ok(place) = HeaderValue::from_str(&format!("/machines/{name}")) {
        response.headers_mut().insert(LOCATION, place);
    }
    Ok(response)
}

async fn carry_out(service: &Service, order: Bytes) -> Result<Value, Refusal> {
    let _turn = service.launches.acquire().await.map_err(|_| Refusal::failed("The service is ending"))?;
    let failed = |e: std::io::Error| Refusal::failed(format!("{} launch: {e}", service.program.display()));
    let mut command = Command::new(&service.program);
    command.arg("launch").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    // Signals to the service's group, as from a terminal, are not for it.
    let mut child = command.process_group(0).spawn().map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that ends early says why.
        let _ = stdin.write_all(&order).await;
    }
    let mut said = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(ANSWER_MAX).read_to_end(&mut said).await.map_err(failed)?;
    }
    let status = child.wait().await.map_err(failed)?;
    let said: Value = serde_json::from_slice(&said)
        .map_err(|_| Refusal::failed(format!("The launch ended without an answer ({status})")))?;
    if status.success() {
        return Ok(said);
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let causes = said.get("causes").and_then(Value::as_array).into_iter().flatten();
    let causes = causes.map(|cause| format!(": {}", text(cause))).collect::<String>();
    let message = text(said.get("message").unwrap_or(&Value::Null));
    Err(Refusal::wrong(format!("{message}{causes}")))
}
