//! A client of streaming URLs: `stream-client URL PROTOCOL [INPUT]` speaks the channel protocol over a WebSocket, sends INPUT
//! on channel 0 and prints every message as `CHANNEL: TEXT`.

#![allow(clippy::unwrap_used, reason = "a test's peer fails by panicking")]

use futures::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    client_async,
    tungstenite::{Message, client::IntoClientRequest},
};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mut request = args[0].replace("http://", "ws://").into_client_request().unwrap();
    request.headers_mut().insert("Sec-WebSocket-Protocol", args[1].parse().unwrap());
    let stream = TcpStream::connect(request.uri().authority().unwrap().as_str()).await.unwrap();
    let (mut socket, _) = client_async(request, stream).await.unwrap_or_else(|e| {
        println!("refused: {e}");
        std::process::exit(1)
    });
    if let Some(input) = args.get(2) {
        let data = [&[0], input.as_bytes()].concat();
        socket.send(Message::Binary(data.into())).await.unwrap();
    }
    while let Some(Ok(message)) = socket.next().await {
        if let Message::Binary(data) = message
            && data.len() > 1
        {
            println!("{}: {}", data[0], String::from_utf8_lossy(&data[1..]));
        }
    }
}
