//! Lists as streams of pieces: each far below gRPC's limit for one message, whatever its items are.

use std::pin::Pin;

use prost::Message;
use tokio_stream::Stream;
use tonic::{Response, Status};

pub(super) type Pieces<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Most items of a piece.
const ITEMS: usize = 500;

/// Bytes of items after which a piece is full. kubelet takes messages of up to 16 MiB.
const BYTES: usize = 1 << 20;

/// A piece has at least one item ("lists of at least one item", api.proto), so an empty list is a stream that ends at once. Pieces are made as
/// they are asked for: a client that goes away costs nothing more.
pub(super) fn pieces<I: Message + 'static, T: Send + 'static>(
    items: Vec<I>,
    wrap: impl Fn(Vec<I>) -> T + Send + 'static,
) -> Response<Pieces<T>> {
    let pieces = split(items.into_iter(), ITEMS, BYTES).map(move |piece| Ok(wrap(piece)));
    Response::new(Box::pin(tokio_stream::iter(pieces)))
}

fn split<I: Message>(
    items: impl Iterator<Item = I>,
    most: usize,
    bytes: usize,
) -> impl Iterator<Item = Vec<I>> {
    let mut items = items;
    std::iter::from_fn(move || {
        let (mut piece, mut size) = (Vec::new(), 0);
        while piece.len() < most && size < bytes {
            let Some(item) = items.next() else { break };
            size += item.encoded_len();
            piece.push(item);
        }
        (!piece.is_empty()).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use podvisor_proto::cri::Container;
    use proptest::prelude::*;
    use tokio_stream::StreamExt;

    use super::*;

    fn named(length: usize) -> Container {
        Container { id: "x".repeat(length), ..Container::default() }
    }

    #[tokio::test]
    async fn an_empty_list_has_no_piece() {
        assert!(pieces(Vec::<Container>::new(), |piece| piece).into_inner().next().await.is_none());
    }

    #[tokio::test]
    async fn many_items_come_in_order_and_once() {
        let items: Vec<Container> = (0..1201).map(named).collect();
        let pieces: Vec<_> = pieces(items.clone(), |piece| piece).into_inner().collect().await;
        let pieces: Vec<Vec<Container>> = pieces.into_iter().map(Result::unwrap).collect();
        assert_eq!(pieces.iter().map(Vec::len).collect::<Vec<_>>(), [500, 500, 201]);
        assert_eq!(pieces.concat(), items);
    }

    proptest! {
        #[test]
        fn no_piece_is_empty_or_too_large(lengths in prop::collection::vec(0_usize..300, 0..60), most in 1_usize..9, bytes in 1_usize..500) {
            let items: Vec<Container> = lengths.iter().map(|length| named(*length)).collect();
            let pieces: Vec<_> = split(items.clone().into_iter(), most, bytes).collect();
            for piece in &pieces {
                prop_assert!(!piece.is_empty() && piece.len() <= most);
                // The last item may go beyond.
                let before: usize = piece[..piece.len() - 1].iter().map(Message::encoded_len).sum();
                prop_assert!(before < bytes);
            }
            prop_assert_eq!(pieces.concat(), items);
        }
    }
}
